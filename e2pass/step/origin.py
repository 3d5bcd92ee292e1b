"""Where the operations of a training step come from: types as stored, line of the user's code, pass that made them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor
from torch.utils._pytree import tree_leaves

from e2pass.dump import dtype_name
from e2pass.program import Program
from e2pass.step.links import value_of
from e2pass.step.node import GraphNode


def describe(program: Program, nodes: Iterable[GraphNode]) -> list[GraphNode]:
    """Return ``nodes`` with ``dtypes``, ``line`` and ``made_by`` filled in where they are not yet."""
    origin = _Origin(program)
    return [
        replace(
            node,
            dtypes=node.dtypes or origin.dtypes(node),
            line=node.line or origin.line(node),
            made_by=node.made_by or origin.made_by(node),
        )
        for node in nodes
    ]


class _Origin:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.flat = {n.name: n for n in program.graphs["train"].graph.nodes}
        self.lines = {
            region.name: {n.name: str(n.meta.get("e2_stack") or "") for n in region.graph.nodes}
            for region in program.plans["train"].regions
        }

    def dtypes(self, node: GraphNode) -> tuple[str, ...]:
        value: object = None
        if node.fx_node is not None:
            value = node.fx_node.meta.get("val")
        elif value_of(node) in self.flat:
            value = self.flat[value_of(node)].meta["val"]
        found = tuple(dtype_name(v.dtype) for v in tree_leaves(value) if isinstance(v, Tensor))
        # Outside of graphs, sums of weights' gradients and updates are described by their width alone.
        return found if len(found) == len(node.outputs) else tuple(f"f{spec.bits}" for spec in node.outputs)

    def line(self, node: GraphNode) -> str:
        if node.site.region == "merge":
            return str(self.flat[value_of(node)].meta.get("e2_stack") or "")
        traced_from = node.fx_node.meta.get("e2_from", "") if node.fx_node is not None else node.inner_name
        return self.lines.get(node.site.region, {}).get(traced_from, "")

    def made_by(self, node: GraphNode) -> str:
        region = node.site.region
        if node.tag.startswith("slu."):
            return "insert-gates"
        if region == "merge":
            return "capture"
        if region == "weight_sum":
            return "predict-signs" if node.tag.startswith("psg.") else "outline"
        if node.fx_node is not None and region in self.program.lowered:
            return self.program.made_by.get(region, {}).get(node.fx_node.name, "lower")
        return "outline" if region in self.lines or region == "gradient_sum" else "price"
