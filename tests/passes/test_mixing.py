"""Bodies in which what is computed for a sample depends on the others of its batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import e2pass

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
    "layer norm": lambda x: nn.functional.layer_norm(x, (6,)),
    "batch second": lambda x: x.t().softmax(0).t(),
    "several rows a sample": lambda x: x.view(-1, 3).softmax(1).view(-1, 6),
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


@pytest.mark.parametrize("example", [torch.randn(8, 6), torch.zeros(2, 6)], ids=["eight", "two alike"])
@pytest.mark.parametrize("name", MIXING)
def test_bodies_that_mix_samples_are_not_gated_per_sample(name: str, example: Tensor) -> None:
    t = e2pass.transform(Net(MIXING[name]), example, config="slu")
    assert [block.gated for block in t.blocks] == [False]
    assert "mixes the samples" in t.blocks[0].reason
    assert t.verify()


@pytest.mark.parametrize("name", SEPARATE)
def test_bodies_that_only_look_like_it_are_gated(name: str) -> None:
    t = e2pass.transform(Net(SEPARATE[name]), torch.randn(8, 6), config="slu")
    assert [block.gated for block in t.blocks] == [True]
    assert t.verify()


def test_a_batch_that_decides_as_one_may_mix() -> None:
    config = e2pass.Config(smd=None, bits=None, psg=None, slu=e2pass.SLU(per="batch"))
    t = e2pass.transform(Net(MIXING["mean"]), torch.randn(8, 6), config=config)
    assert [block.gated for block in t.blocks] == [True]
    assert t.verify()


def test_looking_for_them_changes_nothing() -> None:
    model = Net(SEPARATE["layer norm"])
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    t = e2pass.transform(
        model, torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), config="slu", inplace=True
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert [model.training, model.norm.training, model.layer.training] == [True, False, True]
    assert all(torch.equal(t.model.state_dict()[name], value) for name, value in before.items())
