"""Batch norms called as functions become the operator, so that every later pass sees one form of them."""

from __future__ import annotations

import inspect

import torch
from torch import fx
from torch.nn import functional

_SIGNATURE = inspect.signature(functional.batch_norm)


def unify_batch_norms(graph: fx.Graph) -> None:
    """Replace ``torch.nn.functional.batch_norm`` by ``aten.batch_norm`` with all of its arguments in their order."""
    for node in graph.find_nodes(op="call_function", target=functional.batch_norm):
        bound = _SIGNATURE.bind(*node.args, **node.kwargs)
        bound.apply_defaults()
        x, mean, var, weight, bias, *settings = bound.arguments.values()
        node.target = torch.ops.aten.batch_norm.default
        node.args, node.kwargs = (x, weight, bias, mean, var, *settings, torch.backends.cudnn.enabled), {}
