"""MACs of whole models: against what torch dispatches, and closed forms where torch counts wrongly or nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import e2pass
from benchmarks.mac_counts import analyzed_counts, measure
from e2pass.cost import Phase
from e2pass.step.cost import CostRow
from tests.zoo import ZOO


class Attention(nn.Module):
    """Two heads of four channels over five tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).reshape(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v).mean((1, 2))


MODELS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    **{name: (ZOO[name].build, ZOO[name].make()[1]) for name in ("grouped", "conv1d")},
    "attention": (Attention, torch.randn(2, 5, 8)),
}


@pytest.mark.parametrize("name", MODELS)
def test_each_kind_of_product_has_the_macs_that_torch_dispatches(name: str) -> None:
    """Forward and backward, convolutions and matrix products apart; attention decomposed on both sides.

    ``docs/macs.md`` has the same for over forty models.
    """
    row = measure(name, *MODELS[name])
    assert row.equal, (row.error, row.analyzed, row.torch)
    assert sum(row.torch.values()) > 0


class WantsItsInputsGradient(nn.Module):
    """As Wav2Vec2 does in training, for the sake of gradient checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(1, 4, 3, bias=False), nn.Conv1d(4, 2, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[:, None]
        if self.training:
            x.requires_grad = True
        y: torch.Tensor = self.second(self.first(x).relu()).mean(2)
        return y


def test_a_gradient_that_nobody_reads_is_the_one_exception() -> None:
    """``docs/macs.md``, Wav2Vec2: torch computes the dX of the first convolution; the step has no use for it."""
    row = measure("wants its input's gradient", WantsItsInputsGradient, torch.randn(2, 12))
    assert not row.error
    unread = 2 * 10 * (1 * 4 * 3)
    assert row.torch == {**row.analyzed, "dX convolution": row.analyzed["dX convolution"] + unread}


def rows(model: nn.Module, inputs: Any) -> list[CostRow]:
    step = e2pass.analyze(model, inputs).baseline
    assert step.unpriced == ()
    return list(step.rows)


def macs(found: list[CostRow], keep: Callable[[CostRow], bool]) -> float:
    return sum(row.macs for row in found if keep(row))


class Stack(nn.Module):
    """Three convolutions with 4 channels on 6x6 images."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(i, 4, 3, padding=1, bias=False) for i in (3, 4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.c(self.b(self.a(x).relu()).relu()).mean((2, 3))
        return y


def by_layer(found: list[CostRow], phase: Phase) -> dict[str, float]:
    return {row.layer: row.macs for row in found if row.phase is phase and row.macs}


def test_frozen_layers_have_no_dw_and_nothing_before_the_first_trainable_one_has_dx() -> None:
    model, image = Stack(), torch.randn(2, 3, 6, 6)
    each = {"a": 2 * 36 * 4 * 3 * 9, "b": 2 * 36 * 4 * 4 * 9, "c": 2 * 36 * 4 * 4 * 9}
    found = rows(model, image)
    assert by_layer(found, Phase.DW) == each
    assert by_layer(found, Phase.DX) == {"b": each["b"], "c": each["c"]}
    model.a.weight.requires_grad_(False)
    model.c.weight.requires_grad_(False)
    found = rows(model, image)
    assert by_layer(found, Phase.FORWARD) == each
    assert by_layer(found, Phase.DW) == {"b": each["b"]}
    assert by_layer(found, Phase.DX) == {"c": each["c"]}
    assert {row.layer for row in found if row.phase is Phase.UPDATE} == {"b"}


class Shared(nn.Module):
    """One convolution called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = self.conv(x).relu()
        return x.mean((2, 3))


def test_a_shared_module_is_priced_once_for_each_call() -> None:
    found = rows(Shared(), torch.randn(2, 4, 6, 6))
    one = 2 * 36 * 4 * 4 * 9
    assert macs(found, lambda row: row.phase is Phase.FORWARD) == 3 * one
    assert macs(found, lambda row: row.phase is Phase.DW) == 3 * one
    assert macs(found, lambda row: row.phase is Phase.DX) == 2 * one
    assert len([row for row in found if row.phase is Phase.UPDATE]) == 2  # weight and bias, once each


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.layer = kind(5, 7, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x)[0][:, -1]
        return y


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3)])
def test_recurrent_layers_follow_their_closed_form(kind: type[nn.LSTM] | type[nn.GRU], gates: int, bare: bool) -> None:
    """``steps * batch * gates * hidden * (inputs + hidden)`` forward; torch counts nothing for an LSTM on the CPU.

    Backward: as much again for the weights' gradients, and the hidden state's but not the input's for dX; the first
    step has no hidden state whose gradient is wanted. A ``bare`` layer is captured by torch.export, as a function.
    """
    model, sequence = kind(5, 7, batch_first=True) if bare else Recurrent(kind), torch.randn(2, 3, 5)
    with FlopCounterMode(display=False) as counter:
        model(sequence)
    assert kind is nn.GRU or counter.get_total_flops() == 0
    found = rows(model, sequence)
    inputs, hidden = 3 * 2 * gates * 7 * 5, 3 * 2 * gates * 7 * 7
    assert macs(found, lambda row: row.phase is Phase.FORWARD) == inputs + hidden
    backward = macs(found, lambda row: row.phase in (Phase.DX, Phase.DW, Phase.BACKWARD))
    assert backward == inputs + hidden + hidden * 2 / 3


def test_fused_attention_recomputes_its_scores() -> None:
    """Forward ``B H L S (E + Ev)``, backward ``B H L S (3 E + 2 Ev)``: a product more than decomposed attention."""

    found = analyzed_counts(e2pass.analyze(Attention(), torch.randn(2, 5, 8)).baseline)
    fused = {kind: count for kind, count in found.items() if "attention" in kind}
    scores = 2 * 2 * 5 * 5
    assert sorted(fused.values()) == [scores * (4 + 4), scores * (3 * 4 + 2 * 4)]
