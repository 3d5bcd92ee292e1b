"""Bits(bit_true=True): the same bits from every kernel, thread count and memory format."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch.nn import functional

import e2pass
from e2pass.errors import ConfigError, LoweringError
from e2pass.runtime import bit_true, ops
from tests.zoo import Residual


@given(st.floats(min_value=2.0**-149, max_value=2.0**127, width=32))
def test_scales_become_the_next_power_of_two(scale: float) -> None:
    found = float(ops.next_power_of_two(torch.tensor(scale)))
    assert math.frexp(found)[0] == 0.5, "a power of two"
    assert found >= scale
    assert found / 2 < scale or found == 2.0**-126


def test_vectors_of_scales_become_powers_of_two() -> None:
    """Vectorised kernels may compute other functions than those of single numbers."""
    powers = torch.tensor([2.0**e for e in range(-126, 128)])
    assert torch.equal(ops.next_power_of_two(powers), powers)
    above = torch.nextafter(powers[:-1], torch.tensor(torch.inf))
    assert torch.equal(ops.next_power_of_two(above), powers[1:])
    assert torch.equal(ops.next_power_of_two(torch.nextafter(powers[1:], torch.tensor(0.0))), powers[1:])


def test_spoilt_scales_stay_spoilt() -> None:
    assert ops.next_power_of_two(torch.tensor([float("nan"), float("inf")])).isnan().all()
    codes, scale = ops.quantize(torch.tensor([1.0, float("inf")]), 8, power_of_two=True)
    assert ops.dequantize(codes, scale).isnan().all()


@pytest.mark.parametrize("axis", [None, 1])
def test_codes_fill_at_least_half_of_their_range(axis: int | None) -> None:
    x = torch.randn(64, 5) * torch.tensor([1e-3, 0.1, 1.0, 7.0, 1e4])
    codes, scale = ops.quantize(x, 8, axis, power_of_two=True)
    peaks = codes.abs().max() if axis is None else codes.abs().amax(0)
    assert ((peaks >= 63) & (peaks <= 127)).all()
    assert ((ops.dequantize(codes, scale) - x).abs() <= scale / 2).all()


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5), (6, 4, 5, 3)])
@pytest.mark.parametrize("affine", [True, False])
def test_norms_are_pytorchs(shape: tuple[int, ...], affine: bool) -> None:
    x = torch.randn(shape) * 3 + 5
    weight, bias = (torch.randn(4), torch.randn(4)) if affine else (None, None)
    mean, var = torch.randn(4), torch.rand(4) + 0.5
    functional_form = torch.ops.aten._native_batch_norm_legit_functional
    trained = bit_true.batch_norm(x, weight, bias, mean, var, True, 0.1, 1e-5)
    torch.testing.assert_close(trained, functional_form(x, weight, bias, mean, var, True, 0.1, 1e-5))
    fixed = bit_true.batch_norm(x, weight, bias, mean, var, False, 0.1, 1e-5)[0]
    torch.testing.assert_close(fixed, functional.batch_norm(x, mean, var, weight, bias, eps=1e-5))
    row = torch.randn(shape[1:]) if affine else None
    of_rows = bit_true.layer_norm(x, shape[1:], row, row, 1e-5)
    torch.testing.assert_close(of_rows, torch.native_layer_norm(x, shape[1:], row, row, 1e-5))
    sizes = (shape[0], 4, math.prod(shape[2:]), 2, 1e-5)
    of_groups = bit_true.group_norm(x, weight, bias, *sizes)
    torch.testing.assert_close(of_groups, torch.native_group_norm(x, weight, bias, *sizes))


@contextmanager
def plain_kernels() -> Iterator[None]:
    """PyTorch without oneDNN and NNPACK."""
    switches = (torch._C._set_mkldnn_enabled, torch._C._set_nnpack_enabled)
    for switch in switches:
        switch(False)
    try:
        yield
    finally:
        for switch in switches:
            switch(True)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def convolutional() -> nn.Module:
    """Dense, grouped and strided convolutions with and without bias, every norm, pooling by means, linear layers."""
    grouped = nn.Sequential(
        nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6(), nn.Conv2d(16, 16, 1),
        nn.GroupNorm(4, 16),
    )  # fmt: skip
    dense = nn.Sequential(
        nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)
    )
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(), Residual(grouped), Residual(dense),
        nn.AvgPool2d(8), nn.Flatten(), nn.Linear(16, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


def outputs(model: nn.Module, x: Tensor, training: bool) -> list[Tensor]:
    """Logits, and buffers after the call; the gates compute in full precision, so their statistics are not exact."""
    twin = copy.deepcopy(model).train(training)
    logits = twin(x).detach()
    return [logits, *(b for name, b in twin.named_buffers() if not name.startswith("e2_slu"))]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [convolutional, lambda: e2pass.models.resnet(8)], ids=["layers", "resnet8"])
def test_every_kernel_finds_the_same_bits(make: type[nn.Module], training: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(24, 3, 16, 16)
    t = e2pass.transform(make(), x, config="bit-true")
    for _ in range(2):
        functional.cross_entropy(t.model(x), torch.arange(24) % 10).backward()
    assert not list(t.diagnostics.with_code("E2P401"))
    wanted = outputs(t.model, x, training)
    with plain_kernels():
        without = outputs(t.model, x, training)
    with threads(1):
        alone = outputs(t.model, x, training)
    last = outputs(t.model, x.contiguous(memory_format=torch.channels_last), training)
    for found in (without, alone, last):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


class Permuted(nn.Module):
    """Norms of images whose channels come last, of rows that lie across memory, and of channels that do."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.channels, self.groups = nn.LayerNorm(8), nn.BatchNorm1d(8), nn.GroupNorm(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.groups(x).flatten(2).transpose(1, 2)  # (N, HW, C), and C lies closest in memory or farthest
        y = self.rows(y.transpose(1, 2).contiguous().transpose(1, 2)).sigmoid()
        normed: Tensor = self.channels(y.transpose(1, 2)).tanh().reshape(x.shape)
        return normed


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
def test_gradients_are_the_models(last: bool) -> None:
    """Kernels of backward read memory in the layout that the norm of forward is known to return."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), Permuted(),
        Residual(nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1)),
        nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.AvgPool2d(6), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    original = copy.deepcopy(model)
    x = torch.randn(16, 3, 6, 6).to(memory_format=torch.channels_last if last else torch.contiguous_format)
    bits = e2pass.Bits(x=13, w=13, grad=16, bit_true=True)
    t = e2pass.transform(model, x, config=e2pass.Config(smd=None, slu=e2pass.SLU(gate="open"), psg=None, bits=bits))
    for m in (t.model, original):
        (m(x) * torch.linspace(-1, 1, 64).view(16, 4)).sum().backward()
    for name, parameter in original.named_parameters():
        found, wanted = t.model.get_parameter(name).grad, parameter.grad
        assert found is not None
        assert wanted is not None
        assert (found - wanted).norm() <= 0.02 * wanted.norm() + 1e-3, name


def test_what_depends_on_the_kernel_is_named() -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = functional.gelu(x @ x.transpose(1, 2)).softmax(-1)
            return scores @ x

    class Unnamed(nn.Module):
        """Exact, by itself: batch norms without running statistics, views, maxima, choices."""

        def forward(self, x: Tensor) -> Tensor:
            y = functional.batch_norm(x.transpose(1, 2), None, None, training=True).transpose(1, 2)
            return torch.where(y > 0, y, x.amax(1, keepdim=True)).flip(0).clamp(-2, 2)

    model = nn.Sequential(nn.Linear(16, 16), Unnamed(), Attention(), nn.Flatten(), nn.Linear(2048, 4))
    t = e2pass.transform(model, torch.randn(2, 128, 16), config="bit-true")
    said = "\n".join(map(str, t.diagnostics.with_code("E2P401")))
    for reason in (
        "_softmax adds in an order of the kernel's own",
        "a product in fp32",
        "gelu is rounded as the library at hand rounds it",
        "2048 products of 8 and 8 bits can sum up to 2^25.0, and float32 is exact to 2^24",
    ):
        assert reason in said
    assert len(said.splitlines()) == 5, "the two products of attention, and nothing of the other layers"


def test_a_region_that_is_not_lowered_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise LoweringError("lowering failed: for a test")

    monkeypatch.setattr("e2pass.passes.lower.lower", fail)
    t = e2pass.transform(nn.Linear(8, 4), torch.randn(2, 8), config="bit-true")
    (named,) = t.diagnostics.with_code("E2P401")
    assert "runs as plain PyTorch" in named.message


def test_what_cannot_be_bit_true_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"needs x \+ w of at most 26 bits, not 16 \+ 16"):
        e2pass.Bits(x=16, w=16, bit_true=True)
    with pytest.raises(ConfigError, match="needs rounding='nearest'"):
        e2pass.Bits(rounding="stochastic", bit_true=True)
    with pytest.raises(ConfigError, match="compile=True may contract products and sums"):
        e2pass.Config(bits=e2pass.Bits(bit_true=True), compile=True)
    with pytest.raises(ConfigError, match="compile=True may contract products and sums"):
        e2pass.psg_backend(bits=e2pass.Bits(bit_true=True), compile=True)
