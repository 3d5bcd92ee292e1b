"""The training graph as text: one line an operation, the same in every process and on every machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from e2pass.cost import Phase, Technique, TensorSpec
from e2pass.step.graph import TrainingGraph
from e2pass.step.node import GraphNode

_STORED = {"f32": 32, "f64": 64, "f16": 16, "bf16": 16, "i64": 64, "i32": 32, "i16": 16, "i8": 8, "u8": 8, "b8": 8}


def to_text(graph: TrainingGraph) -> str:
    """Return the dump: a section for each stretch of operations of one region and half.

    A line reads ``%name: type = op(what it reads; constants) {annotations}``. Values are ``%region/node``,
    parameters and buffers ``@name``. Costs are left out: they change with the board.
    """
    info = graph.info
    head = f"training step of {info.model}, {info.batch_size} samples, {len(graph)} operations"
    return head + "\n" + "".join(_sections(graph)) + "\n"


def _sections(graph: TrainingGraph) -> Iterator[str]:
    before = ""
    for node in graph.nodes:
        section = section_of(node)
        if section != before:
            yield f"\n\n{section}"
            before = section
        yield f"\n{line(graph, node)}"


def section_of(node: GraphNode) -> str:
    """Return the heading under which an operation stands."""
    if node.site.phase in (Phase.DATA, Phase.UPDATE) or node.site.region == Phase.LOSS:
        return str(node.site.region)
    return f"region {node.site.region} {'forward' if node.in_forward else 'backward'}"


def line(graph: TrainingGraph, node: GraphNode) -> str:
    """Return the line of one operation."""
    reads = ", ".join([*(f"%{name}" for name in node.operands), *(f"@{name}" for name in node.state)])
    constants = ", ".join(map(str, constants_of(node)))
    call = "; ".join(part for part in (reads, constants) if part)
    notes = " ".join(f"{key}={value}" for key, value in notes_of(graph, node))
    return f"%{node.name}: {type_text(node)} = {node.site.op}({call}) {{{notes}}}"


def type_text(node: GraphNode) -> str:
    """Return the types of what a node produces, e.g. ``f32[4, 16]`` or ``(i8[4, 16], f32[])``."""
    dtypes = node.dtypes or tuple(f"{spec.bits}b" for spec in node.outputs)
    types = [f"{dtype}{list(spec.shape)}" for dtype, spec in zip(dtypes, node.outputs, strict=True)]
    return types[0] if len(types) == 1 else f"({', '.join(types)})"


def notes_of(graph: TrainingGraph, node: GraphNode) -> Iterator[tuple[str, str]]:
    """Yield what else is known about a node, in a fixed order; what is empty is left out."""
    site = node.site
    widths = [spec.bits for spec in node.outputs]
    if any(width != _STORED.get(dtype, width) for width, dtype in zip(widths, node.dtypes, strict=False)):
        yield "bits", "/".join(map(str, widths))
    if node.tag:
        yield "tag", node.tag
    if site.technique is not Technique.BASE:
        yield "technique", str(site.technique)
    if node.gate is not None:
        yield "gate", str(node.gate)
    if node.without_gradient:
        yield "gradient", "none"
    for key, value in (("block", site.block), ("path", site.layer), ("line", node.line), ("pass", node.made_by)):
        if value:
            yield key, value
    yield "p", f"{node.probability(graph.rates):.4g}"


def constants_of(node: GraphNode) -> list[Any]:
    """Return the arguments of an operation that are neither tensors nor computed sizes."""
    if node.fx_node is None:
        return [value for value in node.site.args if not isinstance(value, TensorSpec)]
    return [v for arg, v in zip(node.fx_node.args, node.site.args, strict=True) if not _has_node(arg)]


def _has_node(value: Any) -> bool:
    return isinstance(value, fx.Node) or (isinstance(value, list | tuple) and any(map(_has_node, value)))
