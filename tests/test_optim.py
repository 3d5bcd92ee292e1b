"""The sign optimizer and averaged batch-norm statistics, against closed forms and torch's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.optim.swa_utils import update_bn as torch_update_bn

import e2pass
from e2pass.optim import SignSGD
from tests.zoo import Residual


def weight(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values))


def give(parameter: nn.Parameter, *values: float) -> None:
    parameter.grad = torch.tensor(values)


def test_unit_signs_move_every_weight_by_the_learning_rate() -> None:
    p = weight(1.0, 2.0, 3.0)
    optimizer = SignSGD([p], lr=0.5)
    give(p, 0.1, -7.0, 0.0)
    optimizer.step()
    assert p.tolist() == [0.5, 2.5, 3.0]


def test_mean_scale_multiplies_by_the_mean_magnitude() -> None:
    p = weight(0.0, 0.0)
    optimizer = SignSGD([p], lr=1.0, scale="mean")
    give(p, 1.0, -3.0)
    optimizer.step()
    assert p.tolist() == [-2.0, 2.0]


def test_momentum_of_signs_and_signs_of_momentum() -> None:
    of_signs, signs_of = weight(0.0), weight(0.0)
    optimizers = SignSGD([of_signs], lr=1.0, momentum=0.5), SignSGD([signs_of], 1.0, 0.5, sign_at="momentum")
    for gradient in (10.0, -1.0):
        for p, optimizer in zip((of_signs, signs_of), optimizers, strict=True):
            give(p, gradient)
            optimizer.step()
    assert of_signs.item() == -(1.0 + (0.5 - 1.0))  # the buffer holds 1, then -0.5
    assert signs_of.item() == -2.0  # the buffer holds 10, then 4


def test_groups_without_sign_are_those_of_sgd() -> None:
    p, q = weight(1.0, -2.0), weight(1.0, -2.0)
    ours = SignSGD([{"params": [p], "sign": False}], lr=0.1, momentum=0.9, weight_decay=0.01)
    theirs = torch.optim.SGD([q], lr=0.1, momentum=0.9, weight_decay=0.01)
    for gradient in ((0.3, 4.0), (-1.0, 0.5), (0.2, 0.2)):
        for parameter, optimizer in ((p, ours), (q, theirs)):
            give(parameter, *gradient)
            optimizer.step()
    torch.testing.assert_close(p, q)


def test_nan_is_no_sign() -> None:
    p = weight(1.0, 1.0)
    optimizer = SignSGD([p], lr=0.1)
    give(p, float("nan"), 1.0)
    optimizer.step()
    assert p[0].isnan()
    assert p[1] == 0.9


@pytest.mark.parametrize("bad", [{"lr": -1.0}, {"momentum": 1.0}, {"sign_at": "once"}, {"scale": "max"}])
def test_what_is_not_allowed_is_one_sentence(bad: dict[str, object]) -> None:
    with pytest.raises(e2pass.E2PassError, match="not allowed"):
        SignSGD([weight(1.0)], **{"lr": 0.1, **bad})  # type: ignore[arg-type]
    with pytest.raises(e2pass.E2PassError, match="not allowed"):
        SignSGD([{"params": [weight(1.0)], **bad}], lr=0.1)


def test_signs_of_the_sum_of_micro_batches() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(8, 6), torch.randn(8, 4)
    config = e2pass.Config(smd=None, slu=None, psg=e2pass.PSG(sign=False, beta=0.0))
    t = e2pass.transform(nn.Linear(6, 4), x[:4], config=config)
    groups = t.param_groups(lr=0.1)
    assert [(g["name"], g["sign"]) for g in groups] == [("weights", True), ("norms and biases", False)]
    before = t.model.get_parameter("weight").detach().clone()
    for half, target in zip(x.split(4), y.split(4), strict=True):
        (t.model(half) - target).square().sum().backward()
    summed = t.model.get_parameter("weight").grad
    assert summed is not None
    SignSGD(groups, lr=0.1).step()
    torch.testing.assert_close(t.model.get_parameter("weight"), before - 0.1 * summed.sign())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.conv(x))
        return y


def test_update_bn_is_torchs_on_the_same_arithmetic() -> None:
    torch.manual_seed(0)
    model = Net()
    batches = [2 * torch.randn(n, 3, 6, 6) + 1 for n in (4, 4, 2)]
    exact = e2pass.transform(copy.deepcopy(model), batches[0], config="neutral")
    torch_update_bn(batches, model)
    averaged = AveragedModel(exact.model)
    e2pass.update_bn(batches, averaged)
    for name in ("bn.running_mean", "bn.running_var"):
        torch.testing.assert_close(averaged.module.get_buffer(name), model.get_buffer(name), rtol=1e-5, atol=1e-6)
    quantized = e2pass.transform(Net(), batches[0], config="8bit")
    quantized.model.load_state_dict(model.state_dict(), strict=False)
    e2pass.update_bn(batches, quantized.model)
    torch.testing.assert_close(quantized.model.get_buffer("bn.running_var"), model.bn.running_var, rtol=0.02, atol=0.0)
    with pytest.raises(e2pass.E2PassError, match="swa_utils"):
        e2pass.update_bn(batches, model)


class Called(nn.Module):
    """One norm in front of a residual block, within it twice, and behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(x)
        x = x + self.bn(self.conv(self.bn(self.conv(x)).relu()))
        y: Tensor = self.bn(x).mean((2, 3))
        return y


def test_update_bn_of_a_norm_that_is_called_several_times() -> None:
    torch.manual_seed(0)
    model = Called()
    model.bn.momentum = 1e-3  # so little that the order of the calls within a batch does not matter
    batches = [(i + 1.0) * torch.randn(8, 4, 6, 6) + i for i in range(3)]
    t = e2pass.transform(model, batches[0], config="neutral")
    assert [block.gated for block in t.blocks] == [True]
    torch_update_bn(batches, model)
    e2pass.update_bn(batches, t.model)
    for name in ("bn.running_mean", "bn.running_var"):
        torch.testing.assert_close(t.model.get_buffer(name), model.get_buffer(name), rtol=3e-3, atol=3e-3)


@pytest.mark.parametrize("config", ["slu", "e2train"])
def test_update_bn_passes_over_a_block_that_one_sample_entered(config: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), Residual(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU()), nn.Linear(6, 2))
    batches = [torch.randn(8, 6) for _ in range(3)]
    t = e2pass.transform(model, batches[0], config=config)
    (norm,) = (m for m in t.model.modules() if isinstance(m, nn.BatchNorm1d))
    slu = t.model.e2_slu
    assert slu is not None
    statistics = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    statistics[0].add_(3.0)
    before = [buffer.clone() for buffer in statistics]
    slu.kind, slu.target, slu.min_active = "random", 1.0, 1
    e2pass.update_bn(batches, t.model)
    assert all(torch.equal(a, b) for a, b in zip(before, statistics, strict=True))


def test_update_bn_leaves_all_as_it_was_if_a_batch_does_not_fit() -> None:
    torch.manual_seed(0)
    good = torch.randn(4, 3, 6, 6)
    t = e2pass.transform(Net(), good, config="neutral")
    before = {name: b.clone() for name, b in t.model.named_buffers() if "running" in name}
    with pytest.raises(e2pass.E2PassError, match="channels"):
        e2pass.update_bn([good, good[:, :2]], t.model)
    assert all(torch.equal(t.model.get_buffer(name), b) for name, b in before.items())
