"""Weights that a product takes as they lie, as GPT-2's do: (features in, features out), without a transpose."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import e2pass
from e2pass.backends.onnx_export import check_inference, export_inference


class Affine(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return flat.view(*x.shape[:-1], flat.shape[-1])


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), Affine(32, 64), Affine(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        body: Tensor = self.down(torch.relu(self.up(self.norm(x))))
        return x + body


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("w_scale", ["tensor", "channel"])
def test_products_with_decoded_weights(tmp_path: Path, masked: bool, seen: bool, w_scale: str) -> None:
    """A runtime that took them for weight-only quantization would round activations, and find no codes in a branch."""
    torch.manual_seed(0)
    model = nn.Sequential(Affine(32, 32), Residual(), Residual())
    inputs = torch.randn(4, 6, 32)
    bits = e2pass.PRESETS["8bit"].bits
    assert bits is not None
    config = e2pass.Config(smd=None, psg=None, bits=bits.model_copy(update={"w_scale": w_scale}))
    t = e2pass.transform(model, inputs, config=config)
    if seen:  # activations have scales of their own from now on
        t.model.train()(inputs)
    path = export_inference(t, inputs, tmp_path / "m.onnx", masked=masked)
    assert "0.weight.codes" in {tensor.name for tensor in onnx.load(path).graph.initializer}
    assert check_inference(path, t, torch.randn(7, 6, 32)) <= 1e-5
