"""The controller of the skip ratio in a small net on random data."""

from __future__ import annotations

import pytest
import torch

import e2pass
from tests.runtime.test_slu import config, residual_mlp, train


@pytest.mark.parametrize("skip", [0.2, 0.4, 0.6])
def test_the_controller_reaches_the_target(skip: float) -> None:
    t = e2pass.transform(residual_mlp(), torch.randn(8, 12), config=config(skip=skip))
    executed = train(t, 200)
    assert abs((1 - sum(executed[-100:]) / 100) - skip) < 0.05


def test_a_target_of_zero_skips_nothing_whatever_a_block_costs() -> None:
    t = e2pass.transform(residual_mlp(), torch.randn(8, 12), config=config(skip=0.0))
    assert t.model.e2_slu is not None
    t.model.e2_slu.weight.copy_(torch.tensor([0.001, 0.001, 0.001, 0.997]))
    assert train(t, 20) == [1.0] * 20
    t.model.eval()
    t.model(torch.randn(50, 12))
    assert t.stats()["slu"]["skip_ratio_eval"] == 0.0
