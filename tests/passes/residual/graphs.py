"""Small annotated graphs, and the meaning of a closed gate, for the tests of the block search."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from e2pass.blocks import ResidualBlock


class _Recorder(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        n.meta["val"] = super().run_node(n)
        return n.meta["val"]


def traced(model: nn.Module, *inputs: torch.Tensor, symbolic: bool = True) -> fx.GraphModule:
    """Return the graph of ``torch.fx.symbolic_trace`` as it is, in-place operations included."""
    graph_module = fx.symbolic_trace(model)
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    first = DimDynamic.DUCK if symbolic else DimDynamic.STATIC
    fakes = [
        mode.from_tensor(
            t,
            symbolic_context=StatelessSymbolicContext(
                dynamic_sizes=[first if d == 0 else DimDynamic.STATIC for d in range(t.dim())]
            ),
        )
        for t in inputs
    ]
    with mode, torch.no_grad():
        _Recorder(graph_module).run(*fakes)
    return graph_module


def exported(model: nn.Module, *inputs: torch.Tensor) -> fx.GraphModule:
    """Return the graph of ``torch.export`` with a dynamic batch, with its parameters fetched by name."""
    dynamic = tuple({0: torch.export.Dim.AUTO} for _ in inputs)
    program = torch.export.export(model, inputs, dynamic_shapes=dynamic)
    graph_module = program.module(check_guards=False)
    assert isinstance(graph_module, fx.GraphModule)
    return graph_module


def without(graph_module: fx.GraphModule, block: ResidualBlock) -> fx.GraphModule:
    """Return the graph in which the block's body does not exist and its output is its skip path.

    Erasing a node that something else still reads raises, so this also proves that the body has a single exit.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(graph_module.graph, copies)
    graph.output(result)
    by_name = {node.name: twin for node, twin in copies.items()}
    by_name[block.joins[-1]].replace_all_uses_with(by_name[block.shortcut])
    for name in (*reversed(block.joins), *reversed(block.nodes)):
        graph.erase_node(by_name[name])
    shell = copy.copy(graph_module)
    shortened = fx.GraphModule(shell, graph)
    shortened.graph.lint()
    return shortened


class Fn(nn.Module):
    """A model made of named layers, parameters and buffers, and a function of them and the input."""

    def __init__(self, function: Callable[..., Any], **members: nn.Module | torch.Tensor) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            if isinstance(member, torch.Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


class Fn2(Fn):
    """The same with two inputs."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:  # type: ignore[override]
        return self.function(self, x, y)


def conv(inputs: int, outputs: int | None = None, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    """A convolution that keeps the size of the map at stride 1."""
    return nn.Conv2d(inputs, outputs or inputs, kernel, stride, padding=kernel // 2)


def body(inputs: int, outputs: int | None = None, stride: int = 1) -> nn.Sequential:
    """Two convolutions with batch norms, as in a basic ResNet block."""
    outputs = outputs or inputs
    first, second = conv(inputs, outputs, stride=stride), conv(outputs)
    return nn.Sequential(first, nn.BatchNorm2d(outputs), nn.ReLU(), second, nn.BatchNorm2d(outputs))


def mlp(features: int) -> nn.Sequential:
    """The feed-forward part of a transformer block."""
    return nn.Sequential(nn.Linear(features, 2 * features), nn.GELU(), nn.Linear(2 * features, features))
