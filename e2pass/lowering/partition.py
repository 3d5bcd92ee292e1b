"""Partition of a joint graph into the two halves that run: forward, and backward from what forward saved."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from e2pass.lowering.joint import Joint


@dataclass
class Halves:
    """The two graphs of a region, and the calling convention between them.

    Attributes:
        forward: Inputs as ``forward_inputs``; returns ``forward_outputs`` followed by the saved values.
        inference: The same without saved values.
        backward: Inputs: saved tensors, saved ints, tangents as ``tangents``; returns ``backward_outputs``.
        forward_inputs: ``(kind, key)`` of each forward placeholder.
        forward_outputs: ``(kind, key)`` of each forward output before the saved values.
        saved: Names of the nodes whose tensors forward saves, then of those whose ints it saves.
        saved_tensors: How many of ``saved`` are tensors.
        tangents: Index of the output each tangent belongs to.
        tangent_specs: Fake tensor of each tangent; its stride order is what backward was traced with.
        backward_outputs: ``(kind, key)`` of each backward output.
    """

    forward: fx.GraphModule
    inference: fx.GraphModule
    backward: fx.GraphModule
    forward_inputs: list[tuple[str, Any]]
    forward_outputs: list[tuple[str, Any]]
    saved: list[str]
    saved_tensors: int
    tangents: list[int]
    tangent_specs: list[torch.Tensor]
    backward_outputs: list[tuple[str, Any]]


BACKWARD_KINDS = ("grad", "predicted", "counts")
FORWARD = "forward"
"""Value of ``meta["e2_half"]`` of a node that only backward reads and that forward computes all the same."""

_CHECKS = (torch.ops.aten._assert_async.default, torch.ops.aten._assert_async.msg)


def partition(joint: Joint) -> Halves:
    """Split ``joint``: forward is what its outputs need, everything else waits for backward.

    A node that only backward uses runs in backward even when it does not depend on a tangent, unless its
    ``meta["e2_half"]`` says otherwise. So the operand that is saved for a weight gradient is the integer code, not the
    tensor it decodes to.
    """
    placeholders = joint.graph.find_nodes(op="placeholder")
    values = joint.output_nodes()
    ahead = [(k, v) for k, v in zip(joint.outputs, values, strict=True) if k[0] not in BACKWARD_KINDS]
    back = [(k, v) for k, v in zip(joint.outputs, values, strict=True) if k[0] in BACKWARD_KINDS]
    forward_nodes = forward_half(joint)
    tangents = [(n, key) for n, (kind, key) in zip(placeholders, joint.inputs, strict=True) if kind == "tangent"]
    tangent_nodes = {n for n, _ in tangents}
    backward_nodes = ancestors([v for _, v in back], stop=forward_nodes | set(placeholders)) - set(placeholders)
    used = {a for n in backward_nodes for a in n.all_input_nodes} | {v for _, v in back if isinstance(v, fx.Node)}
    saved = [n for n in joint.graph.nodes if n in used and n not in backward_nodes and n not in tangent_nodes]
    tensors = [n for n in saved if isinstance(n.meta["val"], torch.Tensor)]
    ints = [n for n in saved if not isinstance(n.meta["val"], torch.Tensor)]
    inputs = [n for n in placeholders if n not in tangent_nodes]
    order = {n: i for i, n in enumerate(joint.graph.nodes)}
    forward_body = sorted(forward_nodes - set(placeholders), key=order.__getitem__)
    outputs = [v for _, v in ahead]
    return Halves(
        forward=_extract(joint, inputs, forward_body, [*outputs, *tensors, *ints]),
        inference=_extract(joint, inputs, forward_body, outputs, prune=True),
        backward=_extract(
            joint,
            [*tensors, *ints, *(n for n, _ in tangents)],
            sorted(backward_nodes, key=order.__getitem__),
            [v for _, v in back],
        ),
        forward_inputs=[k for k in joint.inputs if k[0] != "tangent"],
        forward_outputs=[k for k, _ in ahead],
        saved=[n.name for n in (*tensors, *ints)],
        saved_tensors=len(tensors),
        tangents=[key for _, key in tangents],
        tangent_specs=[n.meta["val"] for n, _ in tangents],
        backward_outputs=[k for k, _ in back],
    )


def forward_half(joint: Joint) -> set[fx.Node]:
    """The nodes that forward runs, and the placeholders they read."""
    pairs = zip(joint.outputs, joint.output_nodes(), strict=True)
    found = ancestors([value for (kind, _), value in pairs if kind not in BACKWARD_KINDS])
    found |= ancestors([n for n in joint.graph.nodes if n.meta.get("e2_half") == FORWARD], stop=found)
    found |= _checks(joint)
    claim_results(joint.graph, found)
    return found


def _checks(joint: Joint) -> set[fx.Node]:
    """The checks of what forward computes, which nothing reads, with what they look at."""
    placeholders = joint.graph.find_nodes(op="placeholder")
    tangents = {n for n, (kind, _) in zip(placeholders, joint.inputs, strict=True) if kind == "tangent"}
    of_forward = [ancestors([n]) for n in joint.graph.nodes if n.target in _CHECKS]
    return {node for found in of_forward if found.isdisjoint(tangents) for node in found}


def ancestors(values: list[Any], stop: set[fx.Node] | None = None) -> set[fx.Node]:
    """``values`` and everything they are computed from, up to the nodes in ``stop``, which are left out."""
    seen: set[fx.Node] = set()
    stack = [v for v in values if isinstance(v, fx.Node)]
    while stack:
        node = stack.pop()
        if node in seen or (stop is not None and node in stop):
            continue
        seen.add(node)
        stack.extend(node.all_input_nodes)
    return seen


def claim_results(graph: fx.Graph, forward: set[fx.Node]) -> None:
    """Results of a forward operator that only backward reads (batch statistics, masks, sizes) stay in forward."""
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        picked = node.target is operator.getitem and node.args[0] in forward
        size = isinstance(node.meta["val"], torch.SymInt) and all(
            n in forward or n.op == "placeholder" for n in node.all_input_nodes
        )
        if picked or size:
            forward.add(node)


def _extract(
    joint: Joint, inputs: list[fx.Node], body: list[fx.Node], outputs: list[Any], prune: bool = False
) -> fx.GraphModule:
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        env[node] = graph.placeholder(node.name)
        env[node].meta = node.meta
    for node in body:
        env[node] = graph.node_copy(node, env.__getitem__)
    graph.output([env[v] if isinstance(v, fx.Node) else v for v in outputs])
    if prune:
        graph.eliminate_dead_code()
    return fx.GraphModule(joint.graph_module, graph)  # brings the constants that the trace lifted, nothing else
