"""Every operation of real training graphs is priced or declared free."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import e2pass
from e2pass.backends.fpga import FpgaCostModel
from e2pass.cost import Phase
from e2pass.report import price_step
from tests.backends.fpga_.sites import joint_sites
from tests.zoo import ZOO

MODEL = FpgaCostModel("zedboard")
NAMES = [
    "preact_resnet", "unet", "linknet", "residual_mlp", "dropout", "squeeze_excite", "tied_embedding", "convnext",
    "grouped", "conv1d", "conv3d", "vit", "gpt2", "bert",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_operation_of_the_zoo_is_priced(name: str) -> None:
    step = price_step(joint_sites(*ZOO[name].make()), MODEL)
    assert step.unpriced == ()
    assert step.coverage.ops == step.coverage.macs == step.coverage.bytes == 1
    assert step.energy_j > 0


@pytest.mark.parametrize("build", [lambda: e2pass.models.resnet(20), lambda: e2pass.models.mobilenet_v2()])
def test_every_operation_of_the_shipped_models_is_priced(build: type[nn.Module]) -> None:
    step = price_step(joint_sites(build(), torch.randn(2, 3, 32, 32)), MODEL)
    assert step.unpriced == ()


class Assorted(nn.Module):
    """Layers and functions that the models above do not use."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.Sequential(nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True), nn.PReLU())
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)
        self.embedding, self.cell, self.gru = nn.Embedding(10, 8), nn.LSTMCell(8, 8), nn.GRU(8, 8, batch_first=True)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.attention, self.rms = nn.MultiheadAttention(8, 2, batch_first=True), nn.RMSNorm(8)

    def forward(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        x = self.norms(x)
        for function in (
            functional.silu, functional.elu, functional.leaky_relu, functional.hardswish, functional.hardsigmoid,
            functional.softplus, functional.mish, functional.logsigmoid, torch.tanh, torch.sigmoid,
        ):  # fmt: skip
            x = x + function(x)
        x = functional.max_pool2d(x, 2) + functional.avg_pool2d(x, 2)
        x = functional.interpolate(x, scale_factor=2, mode="bilinear") + functional.interpolate(x, scale_factor=2)
        x = functional.pad(x + self.up(x[..., ::2, ::2]), (1, 1, 1, 1), mode="reflect")
        x = functional.adaptive_max_pool2d(x, 4) + functional.adaptive_avg_pool2d(x, 3).mean((2, 3), keepdim=True)
        e = self.embedding(tokens)
        h, c = self.cell(e[:, 0])
        rows = (
            x.std((2, 3)) + x.var((2, 3)) + x.amax((2, 3)) + x.cumsum(2).mean((2, 3)) + x.flatten(2).topk(2)[0].sum(2)
        )
        rows = rows + torch.logsumexp(x.flatten(2), 2) + functional.normalize(x.flatten(2), dim=2).sum(2)
        seen = h + c + self.gru(e)[0].mean(1) + self.lstm(e)[0].mean(1) + self.attention(e, e, e)[0].mean(1)
        both = torch.stack([rows, seen], 1).mean(1) + torch.where(rows > 0, rows, seen) + torch.roll(rows, 1, 1)
        both = both + rows.gather(1, tokens[:, :8] % 8) + rows[tokens[:, 0] % 2] + self.rms(rows).clamp(min=0)
        both = functional.dropout(both, 0.1) + torch.pow(rows.abs() + 1, 1.5) + torch.rsqrt(rows.abs() + 1)
        losses = (
            functional.mse_loss(rows, seen) + functional.smooth_l1_loss(rows, seen) + functional.l1_loss(rows, seen)
        )
        losses = losses + functional.binary_cross_entropy_with_logits(rows, torch.sigmoid(seen).detach())
        losses = losses + functional.kl_div(
            functional.log_softmax(rows, 1), functional.softmax(seen, 1), reduction="batchmean"
        )
        return losses + functional.cross_entropy(both, tokens[:, 0] % 8)


@pytest.mark.parametrize("training", [True, False])
def test_every_operation_of_assorted_layers_is_priced(training: bool) -> None:
    model = Assorted().train(training)
    step = price_step(joint_sites(model, (torch.randn(2, 8, 16, 16), torch.randint(10, (2, 12)))), MODEL)
    assert step.unpriced == ()


class Weighted(nn.Module):
    """A tensor made in ``forward`` becomes a constant of the captured graph that no module owns."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.fc(x) * torch.tensor([1.0, 2.0, 3.0])
        return y


def test_a_region_with_a_lifted_constant_is_priced_and_runs() -> None:
    model, x = Weighted(), torch.randn(8, 4)
    t = e2pass.transform(model, x, config="8bit")
    report = t.report()
    assert report.coverage.complete
    assert report.baseline.macs == 2 * 8 * 4 * 3  # forward and dW
    scaled = [row for row in report.baseline.rows if row.op == "aten.mul.Tensor"]
    assert [row.phase for row in scaled] == [Phase.FORWARD, Phase.BACKWARD]
    y = t.model(x)
    y.sum().backward()
    assert torch.allclose(y, model(x), atol=0.1)
    grad = t.model.get_parameter("fc.bias").grad
    assert grad is not None
    assert torch.allclose(grad, torch.tensor([8.0, 16.0, 24.0]), rtol=0.01)
