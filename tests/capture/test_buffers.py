"""Buffers that a model assigns anew instead of writing into them, and those that a checkpoint updates in backward."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import e2pass
from e2pass.capture import Capture, capture
from e2pass.diagnostics import Diagnostics
from e2pass.errors import CaptureError
from e2pass.inputs import Inputs

ROWS = torch.linspace(-1, 1, 24).reshape(6, 4)


class Centred(nn.Module):
    """A block that counts its calls and subtracts a running mean which it assigns anew."""

    counter: Tensor
    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("counter", torch.zeros((), dtype=torch.long))
        self.register_buffer("average", torch.ones(4))

    def forward(self, x: Tensor) -> Any:
        h = self.linear(x * self.average)  # backward reads the average from before
        if self.training:
            self.counter = self.counter + 1
            self.average = 0.9 * self.average + 0.1 * h.detach().mean(0)
        return torch.relu(h - self.average)


class Counting(nn.Module):
    """Two residual blocks with such buffers."""

    def __init__(self, *, without_gradients: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Centred(), Centred()])
        self.head = nn.Linear(4, 3)
        self.without_gradients = without_gradients

    def forward(self, x: Tensor) -> Any:
        if self.without_gradients:  # makes the graph one that only torch.export can have
            with torch.no_grad():
                x = x * 2
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Checkpointed(nn.Module):
    """Residual blocks that are run again in the backward pass."""

    def __init__(self, norm: nn.Module, *, reentrant: bool) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), copy.deepcopy(norm), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 8))
            for _ in range(2)
        )
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def taken(model: nn.Module) -> tuple[Capture, Diagnostics]:
    diagnostics = Diagnostics()
    return capture(model, Inputs.of(ROWS), diagnostics), diagnostics


def steps(model: nn.Module, reference: nn.Module, result: Any) -> Iterator[None]:
    """Three steps of SGD of a graph of ``model`` and of the reference, which must agree after each."""
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, reference)]
    for step in range(3):
        outputs = []
        for call in (result, reference):
            torch.manual_seed(step)
            outputs.append(call(ROWS))
        torch.testing.assert_close(*outputs)
        yield
        for output, optimizer in zip(outputs, optimizers, strict=True):
            optimizer.zero_grad()
            output.square().sum().backward()
            optimizer.step()
        for one, other in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("without_gradients", [False, True])
def test_a_buffer_that_is_assigned_anew_is_written(without_gradients: bool) -> None:
    model = Counting(without_gradients=without_gradients)
    reference = copy.deepcopy(model)
    result, _ = taken(model)
    assert result.rung == ("export" if without_gradients else "symbolic_trace")
    for _ in steps(model, reference, lambda x: result.rebuild(result.train(x), True)):
        for name, value in reference.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], value)
    assert int(model.blocks[0].counter) == 3  # type: ignore[arg-type]


def test_a_transformed_model_assigns_the_buffers_of_the_original() -> None:
    model = Counting(without_gradients=False)
    t = e2pass.transform(model, ROWS, config="neutral")
    for _ in steps(t.model, model, t.model):
        pass
    proofs = t.verify()
    assert proofs, proofs
    assert t.unwrap().state_dict().keys() == model.state_dict().keys()
    assert int(t.unwrap().state_dict()["blocks.1.counter"]) == 3


def test_a_lowered_model_assigns_them_too() -> None:
    model = Counting(without_gradients=False)
    t = e2pass.transform(model, ROWS, config="8bit")
    for _ in range(3):
        t.model(ROWS).sum().backward()
        model(ROWS)
    ours, theirs = t.unwrap().state_dict(), model.state_dict()
    assert int(ours["blocks.1.counter"]) == 3
    torch.testing.assert_close(ours["blocks.1.average"], theirs["blocks.1.average"], rtol=0.0, atol=0.02)


class Growing(nn.Module):
    """Its buffer has another shape after each call."""

    queue: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("queue", torch.zeros(1, 4))

    def forward(self, x: Tensor) -> Any:
        self.queue = torch.cat([self.queue, x.detach().mean(0, keepdim=True)])
        return self.linear(x)


class Forgetting(nn.Module):
    """Removes its buffer."""

    mean: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Any:
        self.mean = None
        return self.linear(x)


@pytest.mark.parametrize("model", [Growing(), Forgetting()], ids=lambda m: type(m).__name__)
def test_a_buffer_that_no_graph_can_hold_is_refused(model: nn.Module) -> None:
    with pytest.raises(
        CaptureError, match=r"turns its buffer (queue from .* into .* \(2, 4\)|mean from .* into nothing)"
    ):
        taken(model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_checkpointed_is_part_of_the_graph(reentrant: bool) -> None:
    model = Checkpointed(nn.LayerNorm(8), reentrant=reentrant)
    reference = copy.deepcopy(model)
    result, diagnostics = taken(model)
    assert result.rung == "symbolic_trace"
    assert [d.code for d in diagnostics] == ["E2P100"]
    for _ in steps(model, reference, lambda x: result.rebuild(result.train(x), True)):
        pass
    t = e2pass.transform(model, ROWS, config="neutral")
    assert len(t.blocks) == 2
    proofs = t.verify()
    assert proofs, proofs


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_norm_that_a_checkpoint_updates_twice_is_named(reentrant: bool) -> None:
    model = Checkpointed(nn.BatchNorm1d(8), reentrant=reentrant)
    reference = copy.deepcopy(model)
    result, diagnostics = taken(model)
    assert [d.node for d in diagnostics.with_code("E2P105")] == ["blocks.0.1.running_mean"]
    for _ in steps(model, reference, lambda x: result.rebuild(result.train(x), True)):
        pass
    counts = [int(m.state_dict()["blocks.0.1.num_batches_tracked"]) for m in (model, reference)]
    assert counts == [3, 6]
    proofs = e2pass.transform(model, ROWS, config="neutral").verify()
    assert proofs, proofs
