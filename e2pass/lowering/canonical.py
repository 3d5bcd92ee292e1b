"""Canonical form of a joint graph: every node computes one thing, so that it can be tagged, rewritten and priced."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


def canonicalize(graph: fx.Graph) -> None:
    """Split fused backward nodes, drop identities and dead code; what returns nothing (a check) has the value None."""
    for node in list(graph.nodes):
        if node.op == "call_function":
            node.meta.setdefault("val", None)
        if node.target is aten.convolution_backward.default:
            _split_convolution_backward(graph, node)
        elif node.target in (aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    _merge_equal_sizes(graph)
    graph.eliminate_dead_code()
    graph.lint()


def _merge_equal_sizes(graph: fx.Graph) -> None:
    """One node for each size expression: else backward would keep a tensor only to ask for its shape."""
    first: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, torch.SymInt):
            kept = first.setdefault(value.node.expr, node)
            if kept is not node:
                node.replace_all_uses_with(kept)
                graph.erase_node(node)


def _split_convolution_backward(graph: fx.Graph, node: fx.Node) -> None:
    """One node each for the gradients of input, weight and bias, instead of one node with three outputs."""
    mask = node.args[-1]
    for getitem in list(node.users):
        index = getitem.args[1]
        assert getitem.target is operator.getitem
        assert isinstance(index, int)
        assert isinstance(mask, list | tuple)
        if index == 2:
            _sum_bias_gradient(graph, getitem, node.args[0])  # type: ignore[arg-type]
            continue
        only = [i == index and bool(wanted) for i, wanted in enumerate(mask)]
        with graph.inserting_before(getitem):
            single = graph.call_function(node.target, (*node.args[:-1], only))  # type: ignore[arg-type]
            single.meta = dict(node.meta)
            single.meta["val"] = tuple(v if keep else None for v, keep in zip(node.meta["val"], only, strict=True))
        getitem.args = (single, index)
    graph.erase_node(node)


def _sum_bias_gradient(graph: fx.Graph, getitem: fx.Node, gradient: fx.Node) -> None:
    """The bias's gradient is a sum; asked for it alone, ``convolution_backward`` would keep the input alive."""
    dims = [d for d in range(gradient.meta["val"].dim()) if d != 1]
    with graph.inserting_before(getitem):
        total = call(graph, torch.ops.aten.sum.dim_IntList, gradient, dims, like=getitem)
    getitem.replace_all_uses_with(total)
    graph.erase_node(getitem)


def call(graph: fx.Graph, target: Callable[..., Any], *args: Any, like: fx.Node | None = None, **meta: Any) -> fx.Node:
    """Insert a call at the graph's insertion point, with ``meta["val"]`` propagated through fake tensors.

    Args:
        graph: Graph with an insertion point set by the caller.
        target: An ``OpOverload`` or ``operator.getitem``.
        args: Nodes and constants.
        like: Node whose provenance (layer, stack) the new node inherits.
        meta: Further entries of ``node.meta``.
    """
    node = graph.call_function(target, args)
    if like is not None:
        node.meta.update({k: v for k, v in like.meta.items() if k not in ("val", "tensor_meta")})
    values = fx.node.map_arg(args, lambda n: n.meta["val"])
    node.meta["val"] = target(*values) if target is operator.getitem else _propagate(target, values)
    node.meta.update(meta)
    return node


def _propagate(target: Callable[..., Any], values: Any) -> Any:
    fakes = [v for v in torch.utils._pytree.tree_leaves(values) if isinstance(v, torch._subclasses.FakeTensor)]
    with fakes[0].fake_mode:
        return target(*values)
