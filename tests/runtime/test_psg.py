"""PSG and low precision in whole models, against integer references that do not use the operators."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor, nn

import e2pass
from e2pass.transformed import Transformed
from tests.zoo import ZOO, call, conv_residual, image_net, tensors

UNIT = e2pass.Config(smd=None, slu=None, psg=e2pass.PSG(scale="unit"), bits=e2pass.Bits())
MODELS = ("preact_resnet", "residual_mlp", "vit", "gpt2")


@functools.cache
def prepared(name: str, config: str) -> Transformed:
    model, inputs = ZOO[name].make()
    return e2pass.transform(model, inputs, config={"psg": e2pass.PRESETS["psg"], "unit": UNIT}.get(config, config))


def gradients(t: Transformed, name: str) -> dict[str, Tensor]:
    """Gradients of a fixed random functional of the outputs, on a copy."""
    model = copy.deepcopy(t.model)
    _, inputs = ZOO[name].make()
    generator = torch.Generator().manual_seed(1)
    outputs = [o for o in tensors(call(model, inputs)) if o.requires_grad]
    torch.stack([(o * torch.randn(o.shape, generator=generator)).sum() for o in outputs]).sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def predicted_weights(t: Transformed) -> set[str]:
    return {d.node for d in t.diagnostics.with_code("E2P410")}


@pytest.mark.parametrize("name", MODELS)
def test_unit_gradients_are_signs_and_the_others_are_those_of_8_bits(name: str) -> None:
    t = prepared(name, "unit")
    weights = predicted_weights(t)
    assert len(weights) >= 4
    found, eight = gradients(t, name), gradients(prepared(name, "8bit"), name)
    assert found.keys() == eight.keys()
    for parameter, gradient in found.items():
        if parameter in weights:
            assert set(gradient.unique().tolist()) <= {-1.0, 0.0, 1.0}, parameter
            assert gradient.any(), parameter
        else:
            torch.testing.assert_close(gradient, eight[parameter], rtol=1e-5, atol=1e-7, msg=parameter)
    left = {d.node: d.message for d in t.diagnostics.with_code("E2P411")}
    assert set(found) <= weights | set(left) | {n for n, p in t.model.named_parameters() if p.dim() < 2}
    assert all(reason for reason in left.values())


@pytest.mark.parametrize("name", MODELS)
def test_mean_scale_is_one_magnitude_a_weight(name: str) -> None:
    t = prepared(name, "psg")
    weights = predicted_weights(t)
    found, unit = gradients(t, name), gradients(prepared(name, "unit"), name)
    for parameter in weights & found.keys():
        magnitudes = found[parameter].abs().unique()
        nonzero = magnitudes[magnitudes > 0]
        assert len(nonzero) == 1, parameter
        assert torch.equal(found[parameter].sign(), unit[parameter]), parameter


@pytest.mark.parametrize("name", ["shared_block", "tied_embedding", "gpt2"])
def test_tied_weights_are_signed_once(name: str) -> None:
    t = prepared(name, "unit")
    weights = predicted_weights(t)
    found, eight = gradients(t, name), gradients(prepared(name, "8bit"), name)
    for parameter in weights & found.keys():
        assert set(found[parameter].unique().tolist()) <= {-1.0, 0.0, 1.0}, parameter
    for parameter, gradient in found.items():
        if parameter not in weights:
            torch.testing.assert_close(gradient, eight[parameter], rtol=1e-5, atol=1e-7)
    if name == "shared_block":
        assert {"block.body.0.0.weight", "block.body.2.0.weight"} <= weights


def codes_of(x: Tensor, bits: int) -> tuple[Tensor, float]:
    limit = 2 ** (bits - 1) - 1
    scale = (x.detach().abs().max() / limit).item()
    return torch.clamp(torch.round(x.detach() / scale), -limit, limit).long(), scale


def test_evaluation_freezes_the_scales_of_training() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(12, 10), torch.randn(16, 12)
    t = e2pass.transform(layer, x, config="8bit")
    t.model(x)  # the first batch sets the running scale
    _, xs = codes_of(x, 8)
    wc, ws = codes_of(layer.weight, 8)
    probe = torch.cat([0.1 * torch.randn(3, 12), torch.full((1, 12), 50.0)])  # small values, and some that saturate
    codes = torch.clamp(torch.round(probe / xs), -127, 127)
    expected = (codes.double() * xs) @ (wc.double() * ws).T + layer.bias.double()
    t.model.eval()
    torch.testing.assert_close(t.model(probe).double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(t.model(probe[:1]), t.model(probe)[:1])  # a sample's result is its own


def test_training_with_predicted_signs_lowers_the_loss() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(64, 3, 8, 8), torch.randint(0, 10, (64,))
    config = e2pass.Config(smd=None, slu=None, psg=e2pass.PSG(stats=True))
    t = e2pass.transform(image_net(conv_residual(8), nn.ReLU()), x[:8], config=config)
    optimizer = torch.optim.SGD(t.param_groups(lr=0.1), momentum=0.9)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(t.model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.85 * losses[0]
    for weight in t.stats()["psg"].values():
        assert 0 < weight["use"] <= 1
        assert weight["agreement"] > 0.75


def test_freezing_after_the_transform_is_seen_on_the_export_rung() -> None:
    model, inputs = ZOO["vit"].make()
    t = e2pass.transform(model, inputs, config="8bit")
    weight = t.model.get_parameter("classifier.weight")
    for wanted in (True, False, True):
        weight.requires_grad_(wanted)
        weight.grad = None
        tensors(call(t.model, inputs))[0].square().sum().backward()
        assert (weight.grad is not None) == wanted


def test_each_use_of_a_weight_has_a_running_scale_of_its_own() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(100 * self.layer(x))
            return y

    x = torch.randn(4, 8)
    t = e2pass.transform(Twice(), x, config="8bit")
    t.model(x)
    scales = t.model.e2_scales
    assert scales is not None
    assert scales.names["trunk_0"] == ("layer.weight", "layer.weight#2")
    assert scales.get("trunk_0", "layer.weight#2") > 5 * scales.get("trunk_0", "layer.weight")
    trained = t.model(x)
    torch.testing.assert_close(t.model.eval()(x), trained)


class TokenMean(nn.Module):
    """A LayerNorm transformer of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(self.layer(self.embed(x)).mean(1)))
        return y


def trained_accuracy(model: nn.Module, x: Tensor, y: Tensor, lr: float, setting: str, steps: int) -> float:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    factor = 1024.0 if setting == "loss scaled" else 1.0
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        (factor * nn.functional.cross_entropy(model(x), y)).backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= factor
        if setting == "clipped":
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return float((model(x).argmax(1) == y).float().mean())


@pytest.mark.parametrize("setting", ["plain", "clipped", "loss scaled"])
def test_with_mean_scale_a_learning_rate_keeps_its_meaning(setting: str) -> None:
    """The transformer of benchmarks/psg_scale.py in small."""
    torch.manual_seed(0)
    x = torch.randn(256, 4, 8)
    y = x.mean(1)[:, :4].argmax(1)
    model = TokenMean()
    signed = e2pass.transform(model, x[:4], config="psg").model
    plain, mean = (trained_accuracy(m, x, y, lr=0.1, setting=setting, steps=60) for m in (model, signed))
    assert plain > 0.9
    assert mean > plain - 0.03


def test_a_batch_without_numbers_leaves_the_running_scales_alone() -> None:
    t = e2pass.transform(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(8, 4), config="8bit")
    scales = t.model.e2_scales
    assert scales is not None
    t.model(torch.randn(8, 4))
    before = [buffer.clone() for buffer in scales.buffers()]
    assert t.model(torch.full((8, 4), torch.nan)).isnan().all()
    assert all(torch.equal(a, b) for a, b in zip(before, scales.buffers(), strict=True))
    t.model(3 * torch.randn(8, 4))
    assert not any(torch.equal(a, b) for a, b in zip(before, scales.buffers(), strict=True))
    assert t.model.eval()(torch.randn(8, 4)).isfinite().all()
