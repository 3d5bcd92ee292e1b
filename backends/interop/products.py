"""The convolutions and matrix products of a training step, as loop nests: what dataflow tools are asked about."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from e2pass.backends.fpga.model import FpgaCostModel  # noqa: F401  registers the formulas
from e2pass.backends.fpga.nest import Nest, product
from e2pass.backends.fpga.registry import lookup
from e2pass.cost import Free, TensorSpec
from e2pass.errors import ExportError
from e2pass.step.graph import TrainingGraph
from e2pass.step.node import GraphNode


@dataclass(frozen=True)
class StepProduct:
    """One convolution or matrix product of the step.

    Attributes:
        name: Unique; ``region/node``, and a number where an operation has several products.
        node: The operation.
        nest: Its loops and widths.
        kind: ``forward``, ``dx``, ``dw``, or ``predictor`` for the low-precision weight gradient.
    """

    name: str
    node: GraphNode
    nest: Nest
    kind: str


def step_products(graph: TrainingGraph) -> list[StepProduct]:
    """All products of the step, in order; fused attention as the matrix products it consists of.

    Raises:
        ExportError: If a product has no loop nest; the message names it.
    """
    return [product for node in graph.nodes for product in _of(node)]


def _of(node: GraphNode) -> Iterator[StepProduct]:
    formula = lookup(node.site.op)
    if formula is None or isinstance(formula, Free):
        return
    nests = list(_attention(node)) if "scaled_dot_product" in node.site.op else _nests(node, formula(node.site))
    kind = "predictor" if node.tag.startswith("psg.predict") else str(node.site.phase)
    for number, nest in enumerate(nests):
        yield StepProduct(node.name if len(nests) == 1 else f"{node.name}.{number}", node, nest, kind)


def _nests(node: GraphNode, work: Any) -> list[Nest]:
    found = []
    for part in getattr(work, "products", ()):
        if part.nest is None:
            raise ExportError(
                f"operation {node.name} ({node.site.op}) is a fused product without a loop nest; replace it in the "
                "model by plain convolutions or matrix products"
            )
        found.append(part.nest)
    return found


def _attention(node: GraphNode) -> Iterator[Nest]:
    """Scores and weighted values; backward computes the scores again, then the gradients of V, weights, Q and K."""
    backward = "backward" in node.site.op
    q, k, v = [a for a in node.site.args if isinstance(a, TensorSpec)][1 if backward else 0 :][:3]
    pairs, (t, d), (s, e) = math.prod(q.shape[:-2]), q.shape[-2:], v.shape[-2:]
    sizes = [(t, d, s), (t, s, e)]
    if backward:
        sizes = [(t, d, s), (s, t, e), (t, e, s), (t, s, d), (s, t, d)]
    for m, inner, n in sizes:
        yield product(m, inner, n, (q.bits, k.bits, q.bits), pairs)
