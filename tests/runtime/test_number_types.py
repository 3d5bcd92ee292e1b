"""Models in double precision and under autocast, and transforms of torch.func, which are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import e2pass
from tests.runtime.test_slu import residual_mlp
from tests.zoo import conv_residual, image_net


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return image_net(conv_residual(8), nn.ReLU())


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=dtype)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    functional.cross_entropy(model(x), torch.arange(len(x))).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("config", ["e2train", "slu"])
def test_double_precision_stays_double(config: str) -> None:
    x = images(torch.float64)
    t = e2pass.transform(small_net().double(), x, config=config)
    assert t.model(x).dtype == torch.float64
    found = gradients(t.model, x)
    assert any(n.startswith("e2_slu") for n in found)
    assert all(g.dtype == torch.float64 for n, g in found.items() if not n.startswith("e2_"))


OFF = "ignore:torch.autocast chooses the types of products"


def test_autocast_computes_what_it_would_compute_in_the_original() -> None:
    model, x = small_net(), images()
    t = e2pass.transform(model, x, config="neutral")
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = gradients(model, x), gradients(t.model, x)
        assert t.model(x).dtype == torch.bfloat16
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=0.05, atol=0.05 * float(gradient.abs().max()))


@pytest.mark.parametrize("config", ["psg", "8bit"])
def test_low_precision_is_off_within_autocast_and_says_so(config: str) -> None:
    model, x = small_net(), images()
    t = e2pass.transform(model, x, config=config)
    with torch.autocast("cpu", torch.bfloat16):
        expected = gradients(model, x)
        with pytest.warns(UserWarning, match="low precision and predicted signs are off within it"):
            found = gradients(t.model, x)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=0.05, atol=0.05 * float(gradient.abs().max()))
    outside = [g for g in gradients(t.model, x).values() if g.dim() == 4]
    assert config != "psg" or all(g.abs().unique().numel() <= 2 for g in outside)


@pytest.mark.filterwarnings(OFF)
@pytest.mark.parametrize("config", ["e2train", "slu"])
def test_gates_decide_alike_under_autocast_as_without_from_the_same_features(config: str) -> None:
    x = images()
    t = e2pass.transform(small_net(), x, config=config)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(t.model, x)
    assert all(bool(g.isfinite().all()) for g in found.values())
    assert t.model.e2_slu is not None
    fork = torch.randn(6, 8, 8, 8)
    plain = t.model.e2_slu(0, fork, None)
    with torch.autocast("cpu", torch.bfloat16):
        cast = t.model.e2_slu(0, fork, None)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_transforms_of_functions_are_refused_and_leave_the_model_as_it_is() -> None:
    x = images()
    t = e2pass.transform(small_net(), x, config="8bit")
    before = t.model.eval()(x)
    with pytest.raises(e2pass.E2PassError, match=r"torch\.vmap"):
        torch.vmap(lambda sample: t.model(sample[None]))(x)
    assert torch.equal(t.model(x), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("config", ["e2train", "slu"])
def test_a_converted_model_keeps_its_gates_and_scales_in_their_types(config: str, dtype: torch.dtype) -> None:
    t = e2pass.transform(small_net(), images(), config=config)
    t.model(images()).sum().backward()
    own = {k: v.clone() for k, v in t.model.state_dict().items() if k.startswith("e2_") and isinstance(v, Tensor)}
    t.model.to(dtype).to("cpu", non_blocking=True)
    found = t.model.state_dict()
    assert all(v.dtype == found[k].dtype and torch.equal(v, found[k]) for k, v in own.items())
    x = images(dtype)
    assert t.model(x).dtype == dtype
    slu = t.model.e2_slu
    assert slu is not None
    for _ in range(2):
        t.reset_stats()
        price = slu.price.clone()
        grads = gradients(t.model, x)
        executed = float((slu.weight * slu.opened / slu.decided).sum())
        torch.testing.assert_close(slu.price, price + 0.2 * (executed - (1 - slu.target)), rtol=1e-6, atol=1e-6)
        assert all(g.dtype == (torch.float32 if n.startswith("e2_") else dtype) for n, g in grads.items())
        assert all(bool(g.isfinite().all()) for g in grads.values())
    t.model.eval()
    slu.price.zero_()
    with torch.no_grad():
        found, masked = (t.model.execute((x,), {}, masked=m) for m in (False, True))
    assert found.dtype == dtype
    torch.testing.assert_close(found, masked, rtol=2e-2, atol=2e-2)


def test_skipping_under_autocast_is_multiplying_by_zero() -> None:
    x, config = torch.randn(32, 12), e2pass.Config(smd=None, slu=e2pass.SLU(inject=False), psg=None, bits=None)
    t = e2pass.transform(residual_mlp(), x[:8], config=config)
    for _ in range(3):
        t.model(x)
    found: list[dict[str, Tensor]] = []
    for masked in (False, True):
        twin = copy.deepcopy(t.model)
        with torch.autocast("cpu", torch.bfloat16):
            loss = twin.execute((x,), {}, masked=masked).float().square().sum()
        loss.backward()
        found.append({n: p.grad for n, p in twin.named_parameters() if p.grad is not None and not n.startswith("e2_")})
        assert twin.e2_slu is not None
        assert 0 < float(twin.e2_slu.skip_ratio() or 0) < 1
    for name, gradient in found[1].items():
        torch.testing.assert_close(
            found[0][name], gradient, rtol=0.0, atol=0.03 * float(gradient.abs().max()), msg=name
        )


def test_gates_learn_alike_whether_backward_runs_under_autocast_or_not() -> None:
    x = torch.randn(32, 12)
    t = e2pass.transform(residual_mlp(), x[:8], config="slu")
    found: list[dict[str, Tensor]] = []
    for within in (False, True):
        twin = copy.deepcopy(t.model)
        with torch.autocast("cpu", torch.bfloat16):
            loss = twin(x).float().square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=within):
            loss.backward()
        found.append({n: p.grad for n, p in twin.named_parameters() if p.grad is not None and n.startswith("e2_")})
    for name, gradient in found[0].items():
        torch.testing.assert_close(
            found[1][name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()), msg=name
        )


def test_skipping_images_under_autocast_is_multiplying_by_zero() -> None:
    x = images()
    t = e2pass.transform(small_net(), x, config="slu")
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(30):  # running statistics of the norms arrive where the batch's are
            found = gradients(t.model, x)
    assert any(n.startswith("e2_slu") for n in found)
    assert all(bool(g.isfinite().all()) for g in found.values())
    t.model.eval()
    assert t.model.e2_slu is not None
    t.model.e2_slu.price.zero_()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        real, masked = (t.model.execute((x,), {}, masked=m) for m in (False, True))
    assert 0 < float(t.model.e2_slu.skip_ratio(evaluation=True) or 0) < 1
    torch.testing.assert_close(real, masked, rtol=1e-2, atol=1e-2)
