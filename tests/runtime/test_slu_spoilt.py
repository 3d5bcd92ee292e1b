"""Batches with NaN or infinity, and batches of no sample: what a model in training keeps of them."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import e2pass
from e2pass.runtime.gates import SLUGates
from tests.runtime.test_slu import config, residual_mlp
from tests.zoo import conv_residual, image_net


def learned(per: str = "sample") -> tuple[e2pass.Transformed, SLUGates]:
    t = e2pass.transform(residual_mlp(2), torch.randn(8, 12), config=config(per=per))
    for _ in range(3):
        t.model(torch.randn(8, 12)).sum().backward()
    slu = t.model.e2_slu
    assert slu is not None
    return t, slu


def state(slu: SLUGates) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in slu.named_buffers()}


@pytest.mark.parametrize("per", ["sample", "batch"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_batch_with_a_value_that_is_no_number_moves_nothing_in_the_gates(per: str, value: float) -> None:
    t, slu = learned(per)
    before = state(slu)
    x = torch.randn(8, 12)
    x[2, 0] = value
    t.model(x).sum().backward()
    for name, buffer in slu.named_buffers():
        assert torch.equal(buffer, before[name]), name
    t.model(torch.randn(8, 12)).sum().backward()
    assert not torch.equal(slu.price, before["price"])
    assert all(bool(buffer.isfinite().all()) for buffer in slu.buffers())


def test_the_first_batch_of_all_may_be_spoilt() -> None:
    x = torch.randn(8, 12)
    found = []
    for first in (None, torch.full((8, 12), math.nan)):
        t = e2pass.transform(residual_mlp(2), x, config=config())
        if first is not None:
            t.model(first)
        t.model(x)
        assert t.model.e2_slu is not None
        found.append(state(t.model.e2_slu))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_in_evaluation_a_sample_that_is_no_number_is_closed_and_counts_nowhere() -> None:
    t, slu = learned()
    t.model.eval()
    x = torch.randn(8, 12)
    expected = t.model(x)
    opened, decided = slu.opened_eval.clone(), slu.decided_eval.clone()
    spoilt = torch.cat([x, torch.full((1, 12), math.nan)])
    found = t.model(spoilt)
    torch.testing.assert_close(found[:8], expected)
    assert bool(found[8].isnan().all())
    torch.testing.assert_close(slu.opened_eval, 2 * opened)
    torch.testing.assert_close(slu.decided_eval, 2 * decided)


@pytest.mark.parametrize("per", ["sample", "batch"])
@pytest.mark.parametrize("gate", ["learned", "random", "open", "closed"])
@pytest.mark.parametrize("training", [True, False])
def test_a_batch_of_no_sample_is_the_originals_and_moves_nothing(per: str, gate: str, training: bool) -> None:
    torch.manual_seed(0)
    image = image_net(conv_residual(8), nn.ReLU())
    for model, shape in ((residual_mlp(2), (12,)), (image, (3, 8, 8))):
        t = e2pass.transform(model, torch.randn(6, *shape), config=config(gate, per=per))
        t.model(torch.randn(6, *shape)).sum().backward()
        original = t.unwrap().train(training)
        t.model.train(training)
        t.model.zero_grad()
        assert t.model.e2_slu is not None
        before, nothing = state(t.model.e2_slu), torch.randn(0, *shape)
        expected, found = original(nothing), t.model(nothing)
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        if training:
            found.sum().backward()
        assert all(torch.equal(value, before[name]) for name, value in state(t.model.e2_slu).items())
        assert all(not p.grad.any() for p in t.model.parameters() if p.grad is not None)  # nor NaN


@pytest.mark.parametrize("preset", ["e2train", "8bit"])
@pytest.mark.parametrize("training", [True, False])
def test_a_batch_of_no_sample_in_low_precision(preset: str, training: bool) -> None:
    torch.manual_seed(0)
    t = e2pass.transform(image_net(conv_residual(8), nn.ReLU()), torch.randn(6, 3, 8, 8), config=preset)
    t.model(torch.randn(6, 3, 8, 8)).sum().backward()
    original = t.unwrap().train(training)
    t.model.train(training)
    kept: dict[str, Any] = copy.deepcopy(t.model.state_dict())
    assert t.model(torch.randn(0, 3, 8, 8)).shape == original(torch.randn(0, 3, 8, 8)).shape
    for name, value in t.model.state_dict().items():
        assert not name.startswith("e2_") or not isinstance(value, Tensor) or torch.equal(value, kept[name]), name
    for name, buffer in original.named_buffers():
        torch.testing.assert_close(t.model.get_buffer(name), buffer, equal_nan=True, msg=name)
