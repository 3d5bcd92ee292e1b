"""Compilation of what lies between the products and norms of a half; these run as they are.

Given a whole half, inductor makes loops of its own of the batch norms and of everything in 16-bit integers, which it
does not vectorize, and is slower than the operators it replaces (docs/psg.md has the numbers). So a half is cut: only
islands, quantizers and element-wise operators that feed one another, are compiled.
"""

from __future__ import annotations

import operator
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.utils.fuser_utils import fuse_by_partitions

from e2pass.runtime import ops

aten = torch.ops.aten

_CODES = (torch.int8, torch.int16)

_IN_USE: WeakValueDictionary[str, nn.Module] = WeakValueDictionary()
"""Compiled islands by their code and what they read: the layers of a stage, and equal blocks, share one."""


def fuse(half: fx.GraphModule, backend: str = "inductor") -> fx.GraphModule:
    """A half that computes the same, with its islands compiled by a backend of ``torch.compile``."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(half.graph, {}))
    _read_masks_as_bytes(graph)
    fused = fx.GraphModule(half, graph)
    found = [dict.fromkeys(island) for island in islands(graph)]
    fuse_by_partitions(fused, found, prefix="island_", always_return_tuple=True)
    for i in range(len(found)):
        setattr(fused, f"island_{i}", _compiled(getattr(fused, f"island_{i}"), backend))
    fused.recompile()
    return fused


def _read_masks_as_bytes(graph: fx.Graph) -> None:
    """Let conversions of a saved mask read its zeros and ones as 8-bit integers, for which there are vector loads."""
    for node in graph.find_nodes(op="call_function", target=aten._to_copy.default):
        (mask,) = node.args
        if mask.meta["val"].dtype == torch.bool:
            with graph.inserting_before(node):
                seen = graph.call_function(aten.view.dtype, (mask, torch.int8))
            seen.meta["val"] = mask.meta["val"].view(torch.int8)
            node.args = (seen,)


def islands(graph: fx.Graph) -> list[list[fx.Node]]:
    """Groups of nodes that are worth compiling, in the order of the graph; contracting them leaves no cycle.

    Nodes that feed one another are together where their levels are equal. The level of a node is one above those of
    the operators left as they are that it depends on, so a path that leaves an island never returns to it; a node is
    moved up to the level of its first reader, so that a decoded tensor appears where it is wanted.
    """
    fusible = _fusible(graph)
    level = _levels(graph, fusible)
    group: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node not in fusible:
            continue
        own = group[node] = [node]
        for source in node.all_input_nodes:
            if source in fusible and level[source] == level[node] and group[source] is not own:
                merged, rest = sorted((group[source], own), key=len, reverse=True)
                merged.extend(rest)
                group.update(dict.fromkeys(rest, merged))
                own = merged
    distinct = {id(members): members for members in group.values()}.values()
    return [members for members in distinct if len(members) > 1]  # one operator is as fast as it is


def _fusible(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that may be in an island; not masks as such, which inductor reads and writes one by one."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is operator.getitem:
            fits = node.args[0] in found
        elif node.target in ops.KERNELS:
            fits = not _wide_codes_cross(node, found)
        else:
            sources = [n for n in node.all_input_nodes if n.target is not aten.view.dtype]
            values = [n.meta["val"] for n in (node, *sources)]
            fits = _is_elementwise(node.target) and all(isinstance(v, Tensor) and v.is_floating_point() for v in values)
        if fits:
            found.add(node)
    return found


def _is_elementwise(target: Any) -> bool:
    tags = getattr(target, "tags", ())
    pointwise = torch.Tag.pointwise in tags or target is aten._to_copy.default
    return pointwise and torch.Tag.nondeterministic_seeded not in tags  # inductor draws other random numbers


def _wide_codes_cross(node: fx.Node, fusible: set[fx.Node]) -> bool:
    """Whether an own operator exchanges 16-bit codes with others: inductor reads and writes these one by one, too."""
    if any(_is_wide(n.meta["val"]) and n not in fusible for n in node.all_input_nodes):
        return True
    codes = [n for n in node.users if n.target is operator.getitem and _is_wide(n.meta["val"])]
    return any(user.target not in ops.KERNELS for n in codes for user in n.users)


def _is_wide(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.int16


def _levels(graph: fx.Graph, fusible: set[fx.Node]) -> dict[fx.Node, int]:
    level: dict[fx.Node, int] = {}
    for node in graph.nodes:
        level[node] = max((level[n] for n in node.all_input_nodes), default=0) + (node not in fusible)
    for node in reversed(graph.nodes):
        if node in fusible:
            readers = [n for n in node.users if n.op != "output"]
            level[node] = min((level[n] - (n not in fusible) for n in readers), default=level[node])
    for node in graph.nodes:
        if node in fusible and node.target is operator.getitem:  # of one operator, so at one level
            level[node] = level[node.args[0]]
    return level


def _compiled(island: fx.GraphModule, backend: str) -> nn.Module:
    """The compiled form of an island, in which own operators are their kernels' code."""
    graph = island.graph
    reads = graph.find_nodes(op="placeholder")
    kinds = [(n.meta["val"].dtype, tuple(n.meta["val"].shape)) for n in reads]
    _hold_codes_wide(graph)
    for i, node in enumerate(graph.nodes):
        node._rename(f"n{i}")
        node.target = node.name if node.op == "placeholder" else ops.KERNELS.get(node.target, node.target)
    island.recompile()
    key = f"{backend} {kinds} {island.code}"
    compiled = _IN_USE.get(key)
    if compiled is None:
        compiled = _IN_USE[key] = cast(nn.Module, torch.compile(island, fullgraph=True, backend=backend))
    return compiled


def _hold_codes_wide(graph: fx.Graph) -> None:
    """Integers become 32 bits wide where they enter an island, and have their own width where they leave it.

    The kernels make codes of 32 bits when they are compiled: that is what inductor has vector instructions for.
    """
    inside = next(n for n in graph.nodes if n.op != "placeholder")
    for node in graph.find_nodes(op="placeholder"):
        if node.meta["val"].dtype in _CODES:
            with graph.inserting_before(inside):
                wide = graph.call_function(aten._to_copy.default, (node,), {"dtype": torch.int32})
            node.replace_all_uses_with(wide, delete_user_cb=lambda user, wide=wide: user is not wide)
    output = graph.output_node()
    leaving: Any = output.args[0]
    with graph.inserting_before(output):
        output.args = (tuple(_narrow(graph, node) for node in leaving),)


def _narrow(graph: fx.Graph, node: fx.Node) -> fx.Node:
    dtype = node.meta["val"].dtype
    return graph.call_function(aten._to_copy.default, (node,), {"dtype": dtype}) if dtype in _CODES else node
