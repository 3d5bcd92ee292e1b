"""What an equality proof makes of values that are no numbers."""

from __future__ import annotations

import math

import pytest
import torch

from e2pass.verification import _proof

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("one", "other", "difference"),
    [
        ([1.0, -4.0], [1.0, -3.0], 0.25),
        ([1.0, NAN], [1.0, NAN], 0.0),
        ([4.0, INF, -INF], [3.0, INF, -INF], 0.25),
        ([NAN, NAN], [NAN, NAN], 0.0),
        ([], [], 0.0),
        ([1.0, NAN], [1.0, 2.0], INF),
        ([1.0, 2.0], [1.0, NAN], INF),
        ([1.0, INF], [1.0, -INF], INF),
        ([1.0, INF], [1.0, 2.0], INF),
        ([1.0, INF], [1.0, NAN], INF),
        ([1.0], [1.0, 1.0], INF),
    ],
)
def test_nan_equals_nan_and_differs_from_every_number(one: list[float], other: list[float], difference: float) -> None:
    same = torch.ones(3)
    proof = _proof("", [same, torch.tensor(one), same], [same, torch.tensor(other), same], 1e-4)
    assert proof.difference == difference
    assert proof.holds == (difference == 0.0)
