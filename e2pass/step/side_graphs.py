"""Graphs that are traced beside the model's own, for their price: the gate network and the loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from e2pass.errors import InputError, LoweringError
from e2pass.lowering import lower
from e2pass.lowering.joint import BATCH, Joint, ValueSpec
from e2pass.plan import ValueName
from e2pass.program import Program
from e2pass.runtime.gates import Gate, SLUGates


class _GateMath(nn.Module):
    """What a gate computes, as the board would: pool, embed, LSTM cell, head, standardise, compare."""

    def __init__(self, slu: SLUGates, gate: Gate, first: bool, rank: int) -> None:
        super().__init__()
        self.gate, self.lstm, self.head, self.first = gate, slu.lstm, slu.head, first
        self.pooled = [d for d in range(1, rank) if d != gate.channel_dim]

    def forward(self, fork: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        features = self.gate.embed(fork.mean(self.pooled) if self.pooled else fork)
        h, c = self.lstm(features, None if self.first else (h, c))
        score = self.head(h).squeeze(1) - self.gate.logit_mean
        return score + self.gate.eagerness, h, c


class _LeafCell(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Linear | nn.LSTMCell)


def lower_gate(slu: SLUGates, gate: Gate, shape: tuple[Any, ...], first: bool, batch: int) -> Any:
    """The joint graph of one gate for a block input of ``shape``; ``first`` has no state before it."""
    root = _GateMath(slu, gate, first, len(shape))
    graph = _LeafCell().trace(root)
    hidden = slu.lstm.hidden_size
    specs = [ValueSpec(shape, torch.float32), *[ValueSpec((BATCH, hidden), torch.float32, not first)] * 2]
    return lower(fx.GraphModule(root, graph), specs, batch)


def first_output(program: Program) -> Tensor | None:
    """The first floating-point output of the model, as a fake tensor; None if there is none."""
    values = {n.name: n for n in program.graphs["train"].graph.nodes}
    for leaf in tree_leaves(program.plans["train"].output):
        if isinstance(leaf, ValueName) and isinstance(values[leaf.name].meta["val"], Tensor):
            found: Tensor = values[leaf.name].meta["val"]
            if found.is_floating_point():
                return found
    return None


class _CrossEntropy(nn.Module):
    def __init__(self, dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, output: Tensor, target: Tensor) -> tuple[Tensor]:
        if self.dims == 3:  # (B, T, classes): the classes come last
            output, target = output.flatten(0, 1), target.flatten()
        return (functional.cross_entropy(output, target),)


class _Custom(nn.Module):
    def __init__(self, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, output: Tensor, target: Tensor) -> tuple[Tensor]:
        return (self.loss(output, target),)


def lower_loss(program: Program, output: Tensor, loss: Callable[..., Tensor] | None) -> Joint:
    """Joint graph of the loss forward and backward; None is cross-entropy.

    Raises:
        LoweringError: If the loss cannot be traced for targets of class indices or of the output's shape.
    """
    batch = program.inputs.batch_size
    shape = (BATCH, *(int(s) for s in output.shape[1:]))
    labels = shape[:2] if len(shape) == 3 else (shape[0], *shape[2:])
    root: nn.Module = _Custom(loss) if loss is not None else _CrossEntropy(len(shape))
    targets = [ValueSpec(labels, torch.int64), ValueSpec(shape, output.dtype)]
    failure: Exception | None = None
    for target in targets:
        try:
            if loss is not None:
                _try(loss, ValueSpec(shape, output.dtype).concrete(batch), output.dtype, target, batch)
            gm = fx.symbolic_trace(root)
            return lower(gm, [ValueSpec(shape, output.dtype, True), target], batch)
        except InputError as error:
            raise LoweringError(str(error)) from None
        except Exception as error:
            failure = error
    raise LoweringError(str(failure))


def _try(
    loss: Callable[..., Tensor], shape: tuple[int, ...], dtype: torch.dtype, target: ValueSpec, batch: int
) -> None:
    """Call a loss without computing it; a warning says that the target is none of its kind, as an error does."""
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad():
        warnings.simplefilter("error")
        output = torch.empty(shape, dtype=dtype, requires_grad=True)
        check_loss(loss(output, torch.empty(target.concrete(batch), dtype=target.dtype)))


def check_loss(found: Any) -> None:
    """Raise unless a loss function returned what training can start from.

    Raises:
        InputError: If it is no tensor, not one number, or has no gradient.
    """
    if not isinstance(found, Tensor):
        raise InputError(
            f"the loss returns a {type(found).__name__}; it must be a tensor of one number, such as a mean"
        )
    if found.numel() != 1:
        raise InputError(f"the loss is of shape {list(found.shape)}; it must be one number, such as a mean")
    if not found.requires_grad:
        raise InputError("the loss has no gradient: it was detached, or counts something, as an accuracy does")
