"""Bodies that no part of a batch can run alone: they would fail, or compute something else for the samples in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.stateless import _reparametrize_module

from e2pass.blocks import ResidualBlock
from e2pass.capture.state import model_kept, rng_kept
from e2pass.passes.cut import Cut, batch_symbol, rows_of, spec_of
from e2pass.passes.stand_ins import WithoutChance, awake, noisy, normal
from e2pass.plan import Mode
from e2pass.program import Program
from e2pass.runtime.runner import bind_module
from e2pass.verification import relative_difference

_SAMPLES = 3
_PARTS = ([0], [1, 2])
"""One sample and two: every sample lacks those before or behind it, and neither an even nor an odd number is needed."""
_TOLERANCE = {torch.float16: 5e-2, torch.bfloat16: 5e-2}
_TOLERANCE_ELSE = 1e-3
"""Kernels sum in another order for another number of samples; a body that mixes them is off by far more."""

_FIXED = "the batch size is fixed in the graph, so its body cannot run for some of the samples; per='batch' can skip it"
_STUCK = "its body does not run for some samples of a batch alone; per='batch' can skip it"
_MIXES = "its body mixes the samples of a batch{}, so none of them can skip it alone; per='batch' can"


def obstacles(program: Program) -> list[str]:
    """Why samples cannot skip each gated block one by one, ``""`` where they can and for the other blocks.

    Each body runs on three samples, and on one and two of them alone: what it computes for these must be the same.
    Operators cannot tell: ``mean(0)`` mixes samples or, behind a transpose, does not. Layers that as yet give zeros
    would hide it, so parameters that are zero or constant are replaced meanwhile. In training mode, batch norms use
    their running statistics, and nothing is thrown: the one mixes samples, the other differs, by design.
    """
    found = [""] * len(program.blocks["train"])
    with model_kept(program.model), rng_kept(), torch.no_grad():
        torch.manual_seed(0)
        for mode in _modes(program):
            trial = _Trial(program, mode)
            for i, block in enumerate(program.blocks[mode]):
                found[i] = found[i] or (trial.obstacle(block) if block.gated else "")
    return found


def _modes(program: Program) -> tuple[Mode, ...]:
    """A graph for both modes does the same in both, unless it calls modules that were not traced into."""
    same = program.graphs["train"] is program.graphs["eval"] and not program.capture.leaves
    return ("eval",) if same else ("eval", "train")


class _Trial:
    """One mode's graph, whose bodies are tried."""

    def __init__(self, program: Program, mode: Mode) -> None:
        self.program, self.mode, self.graph = program, mode, program.graphs[mode].graph
        self.nodes = {n.name: n for n in self.graph.nodes}
        self.symbol = batch_symbol(self.graph)
        self.owner = _Owner(program)
        self.parameters = awake(self.owner)

    def obstacle(self, block: ResidualBlock) -> str:
        """Why a part of the batch cannot run a block's body."""
        if self.symbol is None:
            return _FIXED
        cut = self._cut(block)
        module = bind_module(cut.graph, self.owner)
        mixes = self._mixes(cut, module, self._made_up(cut), finite=True) if set(cut.inputs) <= {cut.fork} else None
        if mixes is None:  # it takes only what the model gives it: masks, positions, numbers above zero
            mixes = self._mixes(cut, module, self._example(cut))
        if mixes is None:
            return _STUCK
        return _MIXES.format(" in training" if self.mode == "train" else "") if mixes else ""

    def _cut(self, block: ResidualBlock) -> Cut:
        cut = Cut([self.nodes[n] for n in block.nodes], self.nodes[block.fork])
        cut.build()
        return cut

    def _mixes(self, cut: Cut, module: fx.GraphModule, inputs: Sequence[Any], finite: bool = False) -> bool | None:
        """Whether results for a part of the samples differ from those found among all; None if they cannot be had."""
        with self._ready(), _reparametrize_module(self.owner, self.parameters):
            try:
                among_all: Sequence[Any] = module(*map(_copy, inputs))
                if finite and not all(r.isfinite().all() for r in among_all if isinstance(r, Tensor)):
                    return None
                for part in _PARTS:
                    alone = module(*(self._rows(v, n, part) for v, n in zip(inputs, cut.inputs, strict=True)))
                    expected = (self._rows(v, n, part) for v, n in zip(among_all, cut.outputs, strict=True))
                    pairs = [(a, b) for a, b in zip(expected, alone, strict=True) if isinstance(b, Tensor)]
                    if any(a.shape != b.shape for a, b in pairs):
                        return None
                    if not all(_alike(a, b) for a, b in pairs):
                        return True
            except Exception:  # whatever the model's own operators raise
                return None
        return False

    @contextmanager
    def _ready(self) -> Iterator[None]:
        self.program.model.train(self.mode == "train")
        for module in self.program.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.training = False
        with WithoutChance():  # type: ignore[no-untyped-call]
            yield

    def _made_up(self, cut: Cut) -> list[Tensor]:
        return [normal(n.meta["val"], spec_of(n, self.symbol).concrete(_SAMPLES)) for n in cut.inputs]

    def _example(self, cut: Cut) -> list[Any]:
        return [self._rows(noisy(self._seen[n]), n, range(_SAMPLES)) for n in cut.inputs]

    def _rows(self, value: Any, node: fx.Node, part: Sequence[int]) -> Any:
        """A copy of what some samples have of a value: all of it where it does not grow with the batch."""
        per_sample = rows_of(spec_of(node, self.symbol))
        if not isinstance(value, Tensor) or not per_sample:
            return _copy(value)
        return value.unflatten(0, (-1, per_sample))[list(part)].flatten(0, 1)

    @cached_property
    def _seen(self) -> dict[fx.Node, Any]:
        """What flows into the bodies when the model runs on the example inputs: on as few samples as it takes."""
        wanted = {n for block in self.program.blocks[self.mode] if block.gated for n in self._cut(block).inputs}
        inputs = self.program.inputs
        sizes = [_SAMPLES, *(n for n in (inputs.batch_size, 2 * inputs.batch_size) if n > _SAMPLES)]
        for size in sizes:
            few = inputs.with_batch(size)
            recorder = _Recorder(self.owner, self.graph, wanted)
            try:
                with self._ready():
                    recorder.run(*self.program.capture.bind(few.args, few.kwargs))
            except Exception:
                if size == sizes[-1]:
                    raise
            else:
                break
        return recorder.values


class _Owner(nn.Module):
    """Where the graphs find what they fetch: the model's own parts, and tensors that belong to none."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        for registry in ("_modules", "_parameters", "_buffers"):
            self.__dict__[registry] = dict(program.model.__dict__[registry])
        for name, constant in program.capture.constants.items():
            self.register_buffer(name, constant.clone())


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps some values, before anything that works in place can change them."""

    def __init__(self, owner: nn.Module, graph: fx.Graph, wanted: set[fx.Node]) -> None:
        super().__init__(owner, graph=graph)
        self.wanted = wanted
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.wanted:
            self.values[n] = _copy(result)
        return result


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _alike(expected: Tensor, alone: Tensor) -> bool:
    return relative_difference(expected, alone) <= _TOLERANCE.get(alone.dtype, _TOLERANCE_ELSE)
