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
