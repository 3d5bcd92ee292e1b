"""Bodies that mix samples: what they compute for one depends on which others are in the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from e2pass.inputs import Inputs
from e2pass.passes.cut import Cut, batch_symbol, rows_of, spec_of
from e2pass.program import Program
from e2pass.runtime.runner import bind_module
from e2pass.verification import relative_difference

_SAMPLES = 4
_CHOSEN = slice(1, None, 2)
"""Every other sample: those before one and those behind it are missing from what may depend on them."""
_TOLERANCE = {torch.float16: 5e-2, torch.bfloat16: 5e-2}
_TOLERANCE_ELSE = 1e-3
"""Kernels sum in another order for another number of samples; a body that mixes them is off by far more."""


def mixing_bodies(program: Program) -> list[bool]:
    """Whether each gated block's body mixes samples, False for the others.

    The evaluation graph runs once on four samples, and then each body on two of them: what it computes for these must
    be the same. Operators cannot tell: ``mean(0)`` mixes samples or, behind a transpose, does not.
    """
    graph, blocks = program.graphs["eval"].graph, program.blocks["eval"]
    symbol = batch_symbol(graph)
    mixes = [False] * len(blocks)
    if symbol is None:
        return mixes
    owner = _Owner(program)
    nodes = {n.name: n for n in graph.nodes}
    bodies = {i: _Body([nodes[n] for n in b.nodes], nodes[b.fork], owner) for i, b in enumerate(blocks) if b.gated}
    wanted = {n for body in bodies.values() for n in (*body.cut.inputs, *body.cut.outputs)}
    with _in_evaluation(program.model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        seen = _Recorder(owner, graph, {n: rows_of(spec_of(n, symbol)) for n in wanted})
        few = program.inputs.with_batch(_SAMPLES)
        try:
            seen.run(*program.capture.bind(*_varied(few)))
        except Exception:  # the model allows certain values only
            seen.run(*program.capture.bind(few.args, few.kwargs))
        for i, body in bodies.items():
            mixes[i] = body.mixes(seen.chosen)
    return mixes


class _Owner(nn.Module):
    """Where the graphs find what they fetch: the model's own parts, and tensors that belong to none."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        for registry in ("_modules", "_parameters", "_buffers"):
            self.__dict__[registry] = dict(program.model.__dict__[registry])
        for name, constant in program.capture.constants.items():
            self.register_buffer(name, constant)


class _Body:
    """The body of a block as a function of what flows into it."""

    def __init__(self, nodes: list[fx.Node], fork: fx.Node, owner: nn.Module) -> None:
        self.cut = Cut(nodes, fork)
        self.module = bind_module(self.cut.build(), owner)

    def mixes(self, chosen: dict[fx.Node, Any]) -> bool:
        """Whether the results for the chosen samples alone differ from those found among all samples."""
        inputs = [v.clone() if isinstance(v, Tensor) else v for v in (chosen[n] for n in self.cut.inputs)]
        try:
            results: Sequence[Any] = self.module(*inputs)
        except RuntimeError:  # a shape that only the whole batch has
            return True
        pairs = zip((chosen[n] for n in self.cut.outputs), results, strict=True)
        return any(
            relative_difference(among_all, alone) > _TOLERANCE.get(alone.dtype, _TOLERANCE_ELSE)
            for among_all, alone in pairs
            if isinstance(alone, Tensor)
        )


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps the chosen samples of some values, before anything that works in place can change them.

    Attributes:
        rows: The values to keep, and how many rows of each a sample has; 0 where none, and all of it is kept.
        chosen: What was kept.
    """

    def __init__(self, owner: nn.Module, graph: fx.Graph, rows: dict[fx.Node, int]) -> None:
        super().__init__(owner, graph=graph)
        self.rows = rows
        self.chosen: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.rows:
            per_sample = self.rows[n]
            value = result.unflatten(0, (_SAMPLES, per_sample))[_CHOSEN].flatten(0, 1) if per_sample else result
            self.chosen[n] = value.clone() if isinstance(value, Tensor) else value
        return result


def _varied(inputs: Inputs) -> tuple[Any, Any]:
    """Samples that differ, whatever the example inputs are."""

    def vary(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or not value.isfinite().all():
            return value
        value = value.detach()
        magnitude = value.abs().mean()
        return value + torch.randn_like(value) * torch.where(magnitude > 0, magnitude, 1.0)

    return tree_map(vary, inputs.args), tree_map(vary, inputs.kwargs)


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and each back, with the buffers as they were."""
    modes = {module: module.training for module in model.modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for name, value in buffers.items():
                model.get_buffer(name).copy_(value)
