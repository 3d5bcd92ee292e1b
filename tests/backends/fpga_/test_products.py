"""MACs against torch's FlopCounterMode where it is right, and against sums over groups where it is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

from e2pass.backends.fpga import FpgaCostModel
from e2pass.cost import OpSite, TensorSpec
from tests.backends.fpga_.sites import T, conv, conv_backward, joint_sites, mm, priced, site

MODEL = FpgaCostModel("zedboard")


def macs(op: OpSite) -> float:
    return priced(MODEL.cost(op)).macs


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, Any]:
    """Shapes of a convolution in one to three dimensions; the channels divide by 6."""
    dims = draw(st.integers(1, 3))
    return {
        "n": draw(st.integers(1, 3)),
        "c": 6 * draw(st.integers(1, 2)),
        "o": 6 * draw(st.integers(1, 2)),
        "size": tuple(draw(st.integers(5, 8)) for _ in range(dims)),
        "kernel": tuple(draw(st.integers(1, 3)) for _ in range(dims)),
        "stride": draw(st.integers(1, 2)),
        "padding": draw(st.integers(0, 2)),
        "dilation": draw(st.integers(1, 2)),
        "transposed": draw(st.booleans()),
    }


def run(shape: dict[str, Any], groups: int, x_grad: bool, w_grad: bool) -> tuple[list[OpSite], float]:
    """Run a convolution of ``groups`` groups and its backward as separate convolutions; return sites and MACs."""
    n, c, o, transposed = shape["n"], shape["c"], shape["o"], shape["transposed"]
    dims = len(shape["size"])
    options = {key: (shape[key],) * dims for key in ("stride", "padding", "dilation")}
    function = getattr(functional, f"conv_transpose{dims}d" if transposed else f"conv{dims}d")
    with FlopCounterMode(display=False) as counter:
        for _ in range(groups):
            x = torch.randn(n, c // groups, *shape["size"], requires_grad=x_grad)
            first, second = (c // groups, o // groups) if transposed else (o // groups, c // groups)
            w = torch.randn(first, second, *shape["kernel"], requires_grad=w_grad)
            y = function(x, w, **options)
            if x_grad or w_grad:
                y.sum().backward()
    whole_w = TensorSpec((c, o // groups, *shape["kernel"]) if transposed else (o, c // groups, *shape["kernel"]))
    whole_x, whole_y = T(n, c, *shape["size"]), T(n, o, *y.shape[2:])
    rest = (*(options[k] for k in ("stride", "padding", "dilation")), transposed, (0,) * dims, groups)
    sites = [site("aten.convolution.default", (whole_x, whole_w, None, *rest), whole_y)]
    for index, wanted in enumerate((x_grad, w_grad)):
        if wanted:
            mask = (index == 0, index == 1, False)
            args = (whole_y, whole_x, whole_w, (o,), *rest, mask)
            sites.append(site("aten.convolution_backward.default", args, (whole_x, whole_w)[index]))
    return sites, counter.get_total_flops() / 2


@settings(max_examples=30)
@given(convolutions(), st.booleans(), st.booleans())
def test_convolution_macs_equal_torch(shape: dict[str, Any], x_grad: bool, w_grad: bool) -> None:
    sites, expected = run(shape, 1, x_grad, w_grad)
    assert sum(map(macs, sites)) == expected


@settings(max_examples=20)
@given(convolutions(), st.sampled_from([2, 3, 6]))
@example(dict(n=1, c=6, o=6, size=(5,), kernel=(1,), stride=2, padding=0, dilation=1, transposed=False), 2)
def test_grouped_convolution_macs_are_those_of_its_groups(shape: dict[str, Any], groups: int) -> None:
    """The counter is wrong for the weight gradient of a grouped convolution, so it counts each group alone."""
    sites, expected = run(shape, groups, True, True)
    assert sum(map(macs, sites)) == expected


def test_depthwise_weight_gradient_closed_form() -> None:
    forward = conv(2, 12, 12, 8, 3, groups=12)
    expected = 2 * 8 * 8 * 12 * 1 * 3 * 3
    assert macs(forward) == macs(conv_backward(forward, (False, True, False))) == expected


@given(*(st.integers(1, 9) for _ in range(4)))
def test_matrix_product_macs_equal_torch(b: int, m: int, k: int, n: int) -> None:
    x, y = torch.randn(b, m, k), torch.randn(b, k, n)
    with FlopCounterMode(display=False) as counter:
        torch.bmm(x, y)
    batched = site("aten.bmm.default", (T(b, m, k), T(b, k, n)), T(b, m, n))
    assert macs(batched) == counter.get_total_flops() / 2
    with_bias = site("aten.baddbmm.default", (T(n), T(b, m, k), T(b, k, n)), T(b, m, n))
    assert macs(with_bias) == macs(batched)
    with FlopCounterMode(display=False) as counter:
        torch.addmm(torch.zeros(n), x[0], y[0])
    assert macs(mm(m, k, n)) == counter.get_total_flops() / 2
    assert macs(site("aten.addmm.default", (T(n), T(m, k), T(k, n)), T(m, n))) == macs(mm(m, k, n))


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 6), st.integers(1, 6))
def test_attention_macs_equal_torch(b: int, h: int, length: int, s: int, e: int, ev: int) -> None:
    q, k, v, o = T(b, h, length, e), T(b, h, s, e), T(b, h, s, ev), T(b, h, length, ev)
    forward = site("aten._scaled_dot_product_flash_attention_for_cpu.default", (q, k, v), o, T(b, h, length))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        functional.scaled_dot_product_attention(torch.randn(q.shape), torch.randn(k.shape), torch.randn(v.shape))
    assert macs(forward) == counter.get_total_flops() / 2
    args = (o, q, k, v, o, T(b, h, length), 0.0, False)
    backward = site("aten._scaled_dot_product_flash_attention_for_cpu_backward.default", args, q, k, v)
    assert macs(backward) == flop_counter.sdpa_backward_flop_count(o.shape, q.shape, k.shape, v.shape) / 2


def test_backward_mask_is_the_sum_of_its_parts() -> None:
    forward = conv(4, 8, 8, 8)
    parts = [
        priced(MODEL.cost(conv_backward(forward, (i == 0, i == 1, i == 2)))) for i in range(3)
    ]  # each gradient alone
    whole = priced(MODEL.cost(conv_backward(forward, (True, True, True))))
    assert whole.macs == sum(p.macs for p in parts)
    for level in ("bram", "ddr3"):
        assert whole.traffic_bytes[level] == pytest.approx(sum(p.traffic_bytes[level] for p in parts))
        assert whole.energy_j[level] == pytest.approx(sum(p.energy_j[level] for p in parts))
    assert parts[2].macs == 0
    assert parts[2].alu_ops == 4 * 8 * 8 * 8


def test_each_gradient_reads_what_it_needs() -> None:
    """dX reads the gradient and the weight, dW the gradient and the input, dB the gradient."""
    forward = conv(4, 8, 16, 8)
    gy, x, w, bias = 4 * 16 * 64 * 4, 4 * 8 * 64 * 4, 16 * 8 * 9 * 4, 16 * 4
    expected = {(1, 0, 0): gy + w + x, (0, 1, 0): gy + x + w, (0, 0, 1): gy + bias}
    for mask, bytes_moved in expected.items():
        flags = (bool(mask[0]), bool(mask[1]), bool(mask[2]))
        assert priced(MODEL.cost(conv_backward(forward, flags))).traffic_bytes["ddr3"] == bytes_moved


def test_whole_model_macs_equal_torch() -> None:
    """Forward and backward of a network without grouped convolutions, first layer without dX."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3, 2),
        torch.nn.Flatten(), torch.nn.Linear(72, 10),
    )  # fmt: skip
    x = torch.randn(4, 3, 10, 10)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    total = sum(getattr(MODEL.cost(s), "macs", 0) for s in joint_sites(model, x))
    assert total == counter.get_total_flops() / 2
