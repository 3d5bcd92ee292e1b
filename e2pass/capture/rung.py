"""What one rung of the ladder hands over: two flat graphs of the same model, and how to read their output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

CONSTANT_PREFIX = "e2_const_"

_GRAFTED = ("_parameters", "_buffers", "_modules")


class RungError(Exception):
    """This way of capturing does not work for this model; the message says why.

    Attributes:
        failed_in: Path of the innermost module in which it failed; ``""`` for the model itself.
    """

    def __init__(self, message: str, failed_in: str = "") -> None:
        super().__init__(message)
        self.failed_in = failed_in


@dataclass
class Draft:
    """Graphs of a model before they are given modules, shapes and a verdict.

    Attributes:
        rung: Name of the rung.
        graphs: The graphs of training and of evaluation mode; one object where they do not differ.
        constants: Tensors that belong to no module, by attribute name.
        rebuild: From the graph's output value to the structure that the model returns, per mode.
        leaves: Modules that were not traced into although they are the user's own.
        sizes: Sizes that the graphs hold for, per placeholder, None for any; None where they hold for all.
        allows_batch: Whether what was assumed about the batch size holds for another; None if nothing was.
    """

    rung: str
    graphs: tuple[fx.Graph, fx.Graph]
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    rebuild: tuple[Callable[[Any], Any], Callable[[Any], Any]] = (lambda output: output, lambda output: output)
    leaves: tuple[str, ...] = ()
    sizes: tuple[tuple[int | None, ...], ...] | None = None
    allows_batch: Callable[[int], bool] | None = None


def graft(model: nn.Module, graph: fx.Graph, constants: dict[str, torch.Tensor]) -> fx.GraphModule:
    """Return a module that runs ``graph`` over the very parameters, buffers and submodules of ``model``.

    Registration order and alias keys are the model's own (``GraphModule`` alone would register modules in the order in
    which they run, and forget aliases).
    """
    shell = fx.GraphModule(nn.Module(), fx.Graph(), class_name=type(model).__name__)
    for name in _GRAFTED:
        getattr(shell, name).clear()
        getattr(shell, name).update(getattr(model, name))
    shell._non_persistent_buffers_set = set(model._non_persistent_buffers_set)
    for name, value in constants.items():
        setattr(shell, name, value)
    shell.training = model.training
    shell.graph = graph
    return shell


def same_graph(one: fx.Graph, other: fx.Graph) -> bool:
    """Whether two graphs do the same operations in the same order on the same attributes."""
    if len(one.nodes) != len(other.nodes):
        return False
    number = {node: i for graph in (one, other) for i, node in enumerate(graph.nodes)}

    def key(node: fx.Node) -> tuple[Any, ...]:
        arguments = pytree.tree_map(
            lambda a: f"%{number[a]}" if isinstance(a, fx.Node) else a, (node.args, node.kwargs)
        )
        return node.op, node.target if node.op != "placeholder" else "", repr(arguments)

    return all(key(a) == key(b) for a, b in zip(one.nodes, other.nodes, strict=True))
