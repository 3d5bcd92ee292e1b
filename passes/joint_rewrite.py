"""What the rewrites of joint graphs share: tags, and re-application of layout chains."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from e2pass.cost import Phase, Technique
from e2pass.lowering.canonical import call
from e2pass.lowering.products import WeightGradient
from e2pass.runtime import ops  # noqa: F401  defines torch.ops.e2pass

e2 = torch.ops.e2pass


def after(graph: fx.Graph, node: fx.Node) -> Any:
    """Insertion point behind ``node`` that keeps several insertions in order (``inserting_after`` reverses them)."""
    return graph.inserting_before(node.next)


def tagged(
    graph: fx.Graph,
    target: Any,
    *args: Any,
    like: fx.Node,
    tag: str,
    technique: Technique,
    bits: int | None = None,
    phase: Phase | None = None,
) -> fx.Node:
    """Insert a call that says which rewrite made it, what for, and how wide its result truly is."""
    meta: dict[str, Any] = {"e2_tag": tag, "e2_technique": technique}
    if phase is not None:
        meta["e2_phase"] = phase
    node = call(graph, target, *args, like=like, **meta)
    for key in ("e2_bits", "e2_full_dw", "e2_half", "e2_operands"):
        node.meta.pop(key, None)
    if bits is not None:
        node.meta["e2_bits"] = bits
    return node


def unpack(graph: fx.Graph, node: fx.Node, bits: tuple[int | None, int | None]) -> tuple[fx.Node, fx.Node]:
    """The two results of an operator that returns a pair."""
    first, second = (call(graph, operator.getitem, node, i, like=node) for i in (0, 1))
    for item, width in zip((first, second), bits, strict=True):
        if width is None:
            item.meta.pop("e2_bits", None)
        else:
            item.meta["e2_bits"] = width
    return first, second


def replay(graph: fx.Graph, value: fx.Node, chain: Iterable[fx.Node]) -> fx.Node:
    """Apply the layout operations of ``chain`` to ``value``; the result is as wide as ``value``."""
    for step in chain:
        old, source = step.args[0], value
        copy = graph.node_copy(step, lambda n, old=old, source=source: source if n is old else n)  # type: ignore[misc]
        copy.meta = dict(step.meta)
        if "e2_bits" in value.meta:
            copy.meta["e2_bits"] = value.meta["e2_bits"]
        value = copy
    return value


def source_product(node: fx.Node) -> fx.Node:
    """The product that ``node`` is, or one of whose results it is."""
    return node.args[0] if node.target is operator.getitem else node  # type: ignore[return-value]


def rebuild(graph: fx.Graph, gradient: WeightGradient, rebuilt: dict[fx.Node, fx.Node], tag: str) -> fx.Node:
    """Repeat the gradient's path from its products on what ``rebuilt`` puts in their place; ``rebuilt`` grows."""
    for node in _topological(gradient):
        if node in rebuilt:
            continue
        with after(graph, max(node, *(rebuilt.get(n, n) for n in node.all_input_nodes))):
            copy = graph.node_copy(node, lambda n: rebuilt.get(n, n))
            copy.meta = {**node.meta, "e2_technique": Technique.PSG, "e2_tag": tag}
            rebuilt[node] = copy
    return rebuilt[gradient.value]


def _topological(gradient: WeightGradient) -> list[fx.Node]:
    """Nodes from the products to the gradient, operands first."""
    order: list[fx.Node] = []
    seen: set[fx.Node] = set()

    def visit(node: fx.Node) -> None:
        if node in seen:
            return
        seen.add(node)
        if node not in gradient.products:
            for operand in node.all_input_nodes:
                if isinstance(operand.meta["val"], torch.Tensor):
                    visit(operand)
        order.append(node)

    visit(gradient.value)
    return order
