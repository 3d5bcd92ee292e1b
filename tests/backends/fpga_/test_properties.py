"""Properties of the price of whole steps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import e2pass
from e2pass.backends.fpga import FpgaCostModel
from e2pass.backends.fpga.mapper import map_nest
from e2pass.cost import OpSite, Technique
from e2pass.models import resnet
from e2pass.step.cost import price_step
from tests.backends.fpga_.sites import T, conv, conv_backward, mm, site

ZED = FpgaCostModel("zedboard")

ops = st.builds(
    lambda kind, n, c, o, size: {
        "conv": conv(n, c, o, size),
        "dx": conv_backward(conv(n, c, o, size), (True, False, False)),
        "dw": conv_backward(conv(n, c, o, size), (False, True, False)),
        "mm": mm(n, c, o),
        "relu": site("aten.relu.default", (T(n, c),), T(n, c)),
        "view": site("aten.view.default", (T(n, c), (n * c,)), T(n * c)),
        "unknown": site("mylib.unknown.default", (T(n, c),), T(n, c)),
    }[kind],
    st.sampled_from(["conv", "dx", "dw", "mm", "relu", "view", "unknown"]),
    *(st.integers(1, 40) for _ in range(3)),
    st.integers(3, 30),
)
graphs = st.lists(ops, max_size=6)


@settings(max_examples=40, deadline=None)
@given(graphs, graphs)
def test_additive_over_graphs(one: list[OpSite], other: list[OpSite]) -> None:
    """The price of two graphs is the sum of their prices, figure by figure, and every operation is in one class."""
    parts, whole = [price_step(g, ZED) for g in (one, other)], price_step([*one, *other], ZED)
    for name in ("energy_j", "time_s", "macs", "dram_bytes"):
        assert getattr(whole, name) == pytest.approx(sum(getattr(part, name) for part in parts))
    for level, joules in whole.by_level().items():
        assert joules == pytest.approx(sum(part.by_level().get(level, 0.0) for part in parts))
    assert len(whole.rows) + len(whole.free) + len(whole.unpriced) == len(one) + len(other)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 64), st.integers(1, 64), st.integers(3, 56), st.integers(2, 5), st.sampled_from(["y", "x", "w"]))
def test_linear_in_the_batch_beyond_one_tile(c: int, k: int, size: int, times: int, phase: str) -> None:
    """As many samples again cost as much again, but for what is moved once: never more, and in the end exactly.

    Subadditive in whole batches, but for double buffering: a batch that stays on the chip takes its room once, slices
    of a larger one twice. Where samples fill the array and tiles exactly, equal steps cost equally.
    """

    def energy(batch: int) -> float:
        op = conv(batch, c, k, size)
        if phase != "y":
            op = conv_backward(op, (phase == "x", phase == "w", False))
        cost = ZED.cost(op)
        return sum(cost.energy_j.values())  # type: ignore[union-attr]

    batch = 48  # fills rows of 16 and columns of 12
    one, more, most = energy(batch), energy(times * batch), energy((2 * times - 1) * batch)
    assert more <= times * one * 1.005
    assert most - more == pytest.approx(more - one, rel=0.02)


def test_each_shape_is_mapped_once_however_deep_the_network() -> None:
    """So the price of a network that repeats its blocks grows with the number of rows alone."""
    sites = [conv(16, 16, 16, 32), conv_backward(conv(16, 16, 16, 32), (True, False, False))]
    price_step(sites, FpgaCostModel("zedboard"))
    before = map_nest.cache_info().misses
    price_step(sites * 500, FpgaCostModel("zedboard"))
    assert map_nest.cache_info().misses == before


def test_neutral_costs_the_baseline_plus_the_gates_on_lines_of_their_own() -> None:
    """The share of the gates is that of ResNet-74: gates and blocks repeat in the same proportion."""
    report = e2pass.transform(resnet(8), torch.randn(4, 3, 32, 32), config="neutral").report()
    after = report.transformed
    assert after is not None
    added = after.by_technique()[Technique.SLU.value]
    assert after.macs == report.baseline.macs + added.macs
    assert after.energy_j == pytest.approx(report.baseline.energy_j + added.energy_j)
    assert after.dram_bytes == pytest.approx(report.baseline.dram_bytes + added.dram_bytes)
    assert 0 < added.macs < 4e-4 * report.baseline.macs
    gates = [row for row in after.rows if row.technique is Technique.SLU]
    assert {row.region.partition("_")[0] for row in gates if row.macs} == {"gate"}
