"""Quantized layers and PSG against an independent integer reference, over drawn layers and options."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from e2pass.config import PSG, Bits
from e2pass.passes.joint_rewrite import e2
from tests.lowering import reference as ref
from tests.lowering.layers import Drawn, convolutions, joint, matrix_products, region, run_joint

EXAMPLES = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@st.composite
def options(draw: st.DrawFn) -> tuple[Bits, PSG]:
    bits = Bits(
        x=draw(st.sampled_from([8, 8, 4, 11])), w=draw(st.sampled_from([8, 5])), grad=draw(st.sampled_from([16, 8])),
        w_scale=draw(st.sampled_from(["tensor", "channel"])), bit_true=draw(st.booleans()),
    )  # fmt: skip
    psg = PSG(
        x_bits=draw(st.sampled_from([4, 3, 2])), gy_bits=draw(st.sampled_from([8, 7])) if bits.grad == 8 else 10,
        msb=draw(st.sampled_from(["round", "round", "floor", "truncate"])),
        beta=draw(st.sampled_from([0.0, 0.05, 0.3])), tau=draw(st.sampled_from([None, None, 0.2])),
        sparsify=draw(st.booleans()), sign=draw(st.booleans()), scale=draw(st.sampled_from(["mean", "unit"])),
    )  # fmt: skip
    return bits, psg


def tensors(drawn: Drawn, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    (weight,) = drawn.layer.parameters()
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=generator))
    x = torch.randn(drawn.shape, generator=generator).requires_grad_()
    gy = torch.randn(drawn.function(x.detach(), weight.detach()).shape, generator=generator)
    return weight, x, gy


def assert_within(actual: Tensor | None, exact: Tensor, bound: Tensor, what: str) -> None:
    assert actual is not None
    excess = (actual.detach().double() - exact).abs() - bound
    assert excess.max() <= 0, f"{what} is {excess.max():.3g} beyond the rounding bound"


@given(st.one_of(convolutions(), convolutions(), matrix_products()), options(), st.integers(0, 2**16))
@EXAMPLES
def test_a_layer_is_its_integer_reference(drawn: Drawn, choice: tuple[Bits, PSG], seed: int) -> None:
    (bits, psg), f = choice, drawn.function
    weight, x, gy = tensors(drawn, seed)
    axis = drawn.out_axis if bits.w_scale == "channel" else None
    exact = bits.bit_true
    xc, gc = ref.coded(x, bits.x, power_of_two=exact), ref.coded(gy, bits.grad, power_of_two=exact)
    wc = ref.coded(weight, bits.w, axis, power_of_two=exact)
    xh = ref.high_part(xc, bits.x, min(psg.x_bits, bits.x), psg.msb)
    gh = ref.high_part(gc, bits.grad, min(psg.gy_bits, bits.grad), psg.msb)

    rewritten = joint(drawn.layer, drawn.shape, bits, psg)
    expected = {"bits.x": xc, "bits.w": wc, "bits.grad": gc}
    values = run_joint(rewritten, weight.detach(), x.detach(), gy)
    codes = [n for n in values if n.target in (e2.quantize.default, e2.msb.default)]
    assert len(codes) == 5
    for node in codes:
        found = values[node][0].long()
        wanted = expected.get(node.meta["e2_tag"])
        if wanted is None:
            of_x = node.args[0] is next(n for n in codes if n.meta["e2_tag"] == "bits.x").next
            wanted = xh if of_x else gh
        assert torch.equal(found, wanted.codes), f"{node.name} of {drawn.name}"

    (out,), _ = region(drawn.layer, drawn.shape, bits, psg)([weight, x], [], lambda *_: None)
    out.backward(gy)
    terms = max(weight.numel(), x.numel(), gy.numel())
    absolute = f(xc.value.abs(), wc.value.abs())
    assert_within(out, f(xc.value, wc.value), ref.rounding_bound(absolute, terms), "output")
    dx = ref.input_product(f, x, wc.value, gc.value)
    absolute = ref.input_product(f, x, wc.value.abs(), gc.value.abs())
    assert_within(x.grad, dx, ref.rounding_bound(absolute, terms), "dX")

    unit, high_unit = (xc.scale * gc.scale, xh.scale * gh.scale)
    full = ref.weight_product(f, xc.codes, gc.codes, weight) * unit
    predicted = ref.weight_product(f, xh.codes, gh.codes, weight) * high_unit
    bounds = (
        ref.rounding_bound(ref.weight_product(f, xh.codes.abs(), gh.codes.abs(), weight) * high_unit, terms),
        ref.rounding_bound(ref.weight_product(f, xc.codes.abs(), gc.codes.abs(), weight) * unit, terms),
    )
    wanted_update = ref.select(predicted, full, bounds, psg.beta, psg.tau, psg.sparsify)
    assert weight.grad is not None
    clear, update = wanted_update.clear, weight.grad.double()
    assert clear.double().mean() > 0.5
    if not psg.sign:
        assert_within(update[clear], wanted_update.update[clear], torch.maximum(*bounds)[clear], "update")
        return
    assert torch.equal(update.sign()[clear], wanted_update.sign[clear]), drawn.name
    size = predicted.abs().mean() if psg.scale == "mean" else torch.ones(())
    assert update.abs().max() == pytest.approx(float(size), rel=1e-5)


@given(st.one_of(convolutions(), matrix_products()), st.integers(0, 2**16))
@EXAMPLES
def test_without_rewrites_it_is_autograd(drawn: Drawn, seed: int) -> None:
    weight, x, gy = tensors(drawn, seed)
    (out,), _ = region(drawn.layer, drawn.shape, None, None)([weight, x], [], lambda *_: None)
    found = torch.autograd.grad(out, (weight, x), gy)
    wanted_out = drawn.function(x, weight)
    wanted: Any = torch.autograd.grad(wanted_out, (weight, x), gy)
    torch.testing.assert_close(out, wanted_out)
    torch.testing.assert_close(found, wanted)
