"""Bodies in which what is computed for a sample depends on the others of its batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import e2pass
from e2pass.transformed import Transformed

Inner = Callable[[Tensor], Tensor]
MIXING: dict[str, Inner] = {
    "mean": lambda x: x - x.mean(0),
    "norm of the batch": lambda x: x / x.norm(),
    "flip": lambda x: x.flip(0),
    "roll": lambda x: x.roll(1, 0),
    "softmax over samples": lambda x: x.softmax(0),
    "running sum": lambda x: x.cumsum(0),
    "attention between samples": lambda x: (x @ x.t()).softmax(1) @ x,
}
SEPARATE: dict[str, Inner] = {
    "layer norm": lambda x: F.layer_norm(x, (6,)),
    "batch second": lambda x: x.t().softmax(0).t(),
    "several rows a sample": lambda x: x.view(-1, 3).softmax(1).view(-1, 6),
    "rows of all samples in another order": lambda x: x.t().reshape(-1, 1).tanh().view(6, -1).t(),
    "positions of the samples": lambda x: x[torch.arange(x.shape[0])],
    "the largest of all, to no effect": lambda x: (x - x.max()).exp() / (x - x.max()).exp().sum(1, keepdim=True),
    "numbers above zero only": lambda x: x.square().sum(1, keepdim=True).log() * x,
    "noise": lambda x: x + torch.rand_like(x),
    "dropout in both modes": lambda x: F.dropout(x, 0.5, training=True),
}


class Net(nn.Module):
    def __init__(self, inner: Inner) -> None:
        super().__init__()
        self.stem, self.norm, self.layer = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)
        self.head, self.inner = nn.Linear(6, 3), inner

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.layer(self.inner(self.norm(x))).relu()
        y: Tensor = self.head(x)
        return y


def transformed(model: nn.Module, example: Tensor | None = None, **options: Any) -> Transformed:
    config = e2pass.Config(smd=None, bits=None, psg=None, slu=e2pass.SLU(**options))
    return e2pass.transform(model, torch.randn(8, 6) if example is None else example, config=config)


def reason(t: Transformed) -> str:
    assert [block.gated for block in t.blocks] == [False]
    return t.blocks[0].reason


def decided(t: Transformed, gate: Any, training: bool) -> None:
    """What is skipped is what the masked form multiplies by zero, whatever the gates decide."""
    t.model.train(training)
    x = torch.randn(8, 6)
    t.set_gates(gate)
    for _ in range(4):
        gathered, masked = (copy.deepcopy(t.model).execute((x,), {}, masked=m) for m in (False, True))
        torch.testing.assert_close(gathered, masked)
        t.model(x)  # moves the dice, and the price that the gates decide by


@pytest.mark.parametrize("example", [torch.randn(8, 6), torch.zeros(2, 6)], ids=["eight", "two alike"])
@pytest.mark.parametrize("name", MIXING)
def test_bodies_that_mix_samples_are_not_gated_per_sample(name: str, example: Tensor) -> None:
    assert "mixes the samples" in reason(transformed(Net(MIXING[name]), example))


@pytest.mark.parametrize("name", SEPARATE)
def test_bodies_that_only_look_like_it_are_gated(name: str) -> None:
    t = transformed(Net(SEPARATE[name]))
    assert [block.gated for block in t.blocks] == [True]
    if name not in ("noise", "dropout in both modes"):
        assert t.verify()
        decided(t, "random", training=False)


class Asleep(Net):
    """Mixes samples behind, before or beside layers that as yet give zeros."""

    def __init__(self, how: str) -> None:
        super().__init__(MIXING["mean"])
        self.how = how
        self.gate, self.other = nn.Parameter(torch.ones(6)), nn.Linear(6, 6)
        if how == "last layer":
            nn.init.zeros_(self.layer.weight)
            nn.init.zeros_(self.layer.bias)
        elif how == "norm":
            nn.init.zeros_(self.norm.weight)
        elif how == "layer scale":
            nn.init.constant_(self.gate, 1e-6)
        elif how == "small layer":
            nn.init.normal_(self.layer.weight, std=1e-7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        mixed = self.inner(self.norm(x) * (1 - self.gate)) if self.how == "before" else self.inner(self.norm(x))
        if self.how == "layer scale":
            mixed = x + self.gate * mixed
        x = x + self.layer(x.relu() + mixed if self.how == "small layer" else mixed.relu())
        y: Tensor = self.head(x)
        return y


@pytest.mark.parametrize("how", ["last layer", "norm", "layer scale", "small layer", "before"])
def test_layers_that_give_zeros_as_yet_hide_nothing(how: str) -> None:
    model = Asleep(how)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    t = transformed(model)
    assert "mixes the samples" in reason(t)
    assert all(torch.equal(t.model.state_dict()[name], value) for name, value in before.items())


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(5, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        y: Tensor = h + self.layer(h - h.mean(0)).relu()
        return y


def test_samples_that_are_alike_hide_nothing() -> None:
    assert "mixes the samples" in reason(transformed(Tokens(), torch.zeros(4, 3, dtype=torch.int64)))


class ByMode(Net):
    def __init__(self, inner: Inner, mode: bool) -> None:
        super().__init__(inner)
        self.mode, self.drop = mode, nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        h = self.drop(self.norm(x))
        x = x + self.layer(self.inner(h) if self.training is self.mode else h).relu()
        y: Tensor = self.head(x)
        return y


class Stochastic(Net):
    """Batch norm, dropout, drop path and noise: in training no two runs are alike, and nothing mixes samples."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        h = F.dropout(self.norm(x), 0.3, self.training)
        h = self.layer(F.rrelu(h, training=self.training))
        if self.training:
            h = h * (0.8 + torch.rand(h.shape[0], 1)).floor() / 0.8 + torch.randn_like(h)
        x = x + h
        y: Tensor = self.head(x)
        return y


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
def test_what_is_mixed_in_one_mode_only_counts(mode: bool) -> None:
    found = reason(transformed(ByMode(MIXING["mean"], mode)))
    assert "mixes the samples" in found
    assert ("in training" in found) is mode
    shuffled = transformed(ByMode(lambda x: x[torch.randperm(x.shape[0])], mode))
    assert "mixes the samples" in shuffled.blocks[0].reason


def test_chance_and_batch_norms_are_no_mixing() -> None:
    t = transformed(Stochastic(SEPARATE["layer norm"]))
    assert [block.gated for block in t.blocks] == [True]
    assert t.verify()


class Opaque(nn.Module):
    """A module that cannot be traced into, which mixes samples in training."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().abs().sum()) >= 0 and self.training:
            x = x - x.mean(0)
        y: Tensor = self.layer(x).relu()
        return y


def test_modules_that_were_not_traced_into_are_tried_in_both_modes() -> None:
    model = Net(SEPARATE["layer norm"])
    model.layer = Opaque()  # type: ignore[assignment]
    t = transformed(model)
    assert list(t.diagnostics.with_code("E2P102"))
    assert "mixes the samples of a batch in training" in t.blocks[0].reason


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gate", ["random", "learned"])
def test_a_batch_that_decides_as_one_may_mix(gate: str, training: bool) -> None:
    t = transformed(Net(MIXING["mean"]), per="batch")
    assert [block.gated for block in t.blocks] == [True]
    assert t.verify()
    decided(t, gate, training)


class FixedBatch(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).view(8, -1)
        x = x + self.layer(self.norm(x)).relu()
        y: Tensor = self.head(x)
        return y


def test_a_graph_for_one_batch_size_has_no_gates_per_sample() -> None:
    t = transformed(FixedBatch(lambda x: x))
    assert list(t.diagnostics.with_code("E2P110"))
    assert "batch size is fixed" in reason(t)
    assert t.verify()
    assert list(t.diagnostics.with_code("E2P212"))


@pytest.mark.parametrize("training", [True, False])
def test_a_graph_for_one_batch_size_has_gates_per_batch(training: bool) -> None:
    t = transformed(FixedBatch(lambda x: x), per="batch")
    assert [block.gated for block in t.blocks] == [True]
    assert t.verify()
    decided(t, "random", training)


@pytest.mark.parametrize("inner", [lambda x: x.view(2, -1, 6).softmax(2).view(-1, 6), lambda x: x.squeeze()])
def test_bodies_that_need_an_even_number_or_more_than_one(inner: Inner) -> None:
    assert "does not run for some samples" in reason(transformed(Net(inner)))


def test_looking_for_them_changes_nothing() -> None:
    model = ByMode(SEPARATE["layer norm"], True)
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    t = e2pass.transform(
        model, torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), config="slu", inplace=True
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert [model.training, model.norm.training, model.layer.training] == [True, False, True]
    assert all(torch.equal(t.model.state_dict()[name], value) for name, value in before.items())
