"""What gates cost in the analyzer's eyes."""

from __future__ import annotations

import pytest
import torch

import e2pass
from tests.runtime.test_slu import config


def forward_macs(features: int, hidden: int = 10) -> int:
    """Embedding, one LSTM cell and the head, written out."""
    return features * hidden + 4 * hidden * (hidden + hidden) + hidden


@pytest.mark.slow
def test_the_gates_of_resnet_74_take_less_than_4_of_10000_macs() -> None:
    batch = 2
    t = e2pass.transform(e2pass.models.resnet(74), torch.randn(batch, 3, 32, 32), config=config())
    gates = t.graph.select(tag="slu.gate").price
    stages = [16] * 12 + [16] + [32] * 11 + [32] + [64] * 11  # channels of each block's input
    forward = sum(forward_macs(channels) for channels in stages) - 4 * 10 * 10  # the first has no state to multiply
    measured = gates.by_phase()["forward"].macs
    assert measured == pytest.approx(batch * forward, rel=0.011)
    assert 0 < gates.macs < 0.0004 * t.graph.original.price.macs
    assert not gates.unpriced
