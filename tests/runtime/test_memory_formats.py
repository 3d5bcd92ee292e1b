"""Regions hand images on with the channels last; one that convolves nothing takes them as they come."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import e2pass
from tests.zoo import conv_bn, conv_residual

FINE = e2pass.Config(smd=None, slu=e2pass.SLU(gate="open"), psg=None, bits=e2pass.Bits(x=16, w=16, grad=16))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [(6, 3, 8, 8), (3, 3, 8, 8)], ids=["the examples' batch", "another batch"])
def test_a_head_that_flattens_images_after_a_gate(training: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv_bn(3, 8), nn.ReLU(), conv_residual(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    original = copy.deepcopy(model).train(training)
    t = e2pass.transform(model, torch.randn(6, 3, 8, 8), config=FINE)
    t.model.train(training)
    images = torch.randn(shape)
    for _ in range(2):
        torch.testing.assert_close(t.model(images), original(images), rtol=1e-2, atol=1e-2)
    last = images.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(t.model(last), original(images), rtol=1e-2, atol=1e-2)
    t.model(images).square().sum().backward()
    original(images).square().sum().backward()
    for name, parameter in original.named_parameters():
        difference = t.model.get_parameter(name).grad - parameter.grad  # type: ignore[operator]
        assert difference.norm() <= 0.1 * parameter.grad.norm() + 1e-4, name  # type: ignore[union-attr]
