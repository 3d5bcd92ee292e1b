"""Models in double precision and under autocast, and transforms of torch.func, which are refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import e2pass
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


def test_autocast_computes_what_it_would_compute_in_the_original() -> None:
    model, x = small_net(), images()
    t = e2pass.transform(model, x, config="neutral")
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = gradients(model, x), gradients(t.model, x)
        assert t.model(x).dtype == torch.bfloat16
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=0.05, atol=0.05 * float(gradient.abs().max()))


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
