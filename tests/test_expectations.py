"""How often things happen, and what that makes of the price of a step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import e2pass
from e2pass.cost import Free, OpCost, OpSite, Phase, TensorSpec, Unsupported
from e2pass.errors import ConfigError
from e2pass.report import CostReport
from e2pass.step.cost import UnitPrices
from e2pass.step.node import GraphNode
from e2pass.step.pricing import PricedNodes
from e2pass.step.rates import PredictorHardware, Rates, remaining
from e2pass.transformed import Transformed
from tests.zoo import vector_net, vector_residual

BATCH = 8
SHARE = st.floats(0.0, 1.0)


class Affine:
    """A sample costs 1 J and 2 s, an execution 10 J and 20 s more, whatever the sample count."""

    name, dram = "affine", "dram"

    def sources(self) -> dict[str, str]:
        return {}

    def cost(self, site: OpSite) -> OpCost | Free | Unsupported:
        n = site.outputs[0].shape[0]
        return OpCost(n, 0, 0, 20 + 2 * n, {"compute": 10 + n, "static": 0.0}, {"dram": 4 * n}, "affine")


def node(batch: int, gate: int | None, **more: object) -> GraphNode:
    spec, half = TensorSpec((batch, 3)), TensorSpec((batch // 2, 3))
    site = OpSite("n", "op", (spec,), (spec,))
    small = replace(site, args=(half,), outputs=(half,)) if gate is not None else None
    return GraphNode(site, gate=gate, half=small, **more)  # type: ignore[arg-type]


@given(st.integers(2, 64), SHARE, st.floats(0.0, 0.99))
def test_a_gated_operation_costs_entering_once_and_each_sample(batch: int, skip: float, drop: float) -> None:
    """Closed form: kept * (P(some sample enters) * 10 + expected samples * 1)."""
    priced = PricedNodes([node(batch, 0)], UnitPrices(Affine()), batch)
    rates = Rates(drop=drop, skip={0: skip}, batch=batch)
    step = priced.step(rates, ("smd", "slu"), PredictorHardware())
    enters = 1 - skip**batch
    assert step.energy_j == pytest.approx((1 - drop) * (10 * enters + batch * (1 - skip)), rel=1e-9, abs=1e-9)
    assert step.time_s == pytest.approx((1 - drop) * (20 * enters + 2 * batch * (1 - skip)), rel=1e-9, abs=1e-9)
    assert step.macs == pytest.approx((1 - drop) * batch * (1 - skip), rel=1e-9, abs=1e-9)


@given(st.lists(st.booleans(), min_size=1, max_size=4), SHARE, SHARE)
def test_sums_equal_the_rows(gated: list[bool], skip: float, drop: float) -> None:
    nodes = [node(6, 0 if g else None) for g in gated]
    priced = PricedNodes(nodes, UnitPrices(Affine()), 6)
    rates = Rates(drop=drop, skip={0: skip}, batch=6)
    step = priced.step(rates, ("smd", "slu"), PredictorHardware())
    variant = priced.variant(rates, ("smd", "slu"), PredictorHardware())
    assert variant.totals.energy_j == pytest.approx(step.energy_j)
    assert variant.by_phase["forward"].macs == pytest.approx(step.macs)
    assert variant.by_level == pytest.approx(step.by_level())
    assert variant.traffic_by_level == pytest.approx(step.traffic_by_level())


def test_coasting_updates_happen_in_dropped_steps_too() -> None:
    rates = Rates(drop=0.75, skip={0: 1.0}, batch=4)
    assert node(4, None).probability(rates) == 0.25
    assert node(4, None, coasts=True).probability(rates) == 1.0
    assert node(4, 0, coasts=True).executions(rates) == (0.75, 0.75)  # the block is never entered, but it coasts


def test_what_does_not_grow_with_the_batch_happens_if_anyone_enters() -> None:
    spec = TensorSpec((3, 3))
    site = OpSite("w", "op", (spec,), (spec,))
    once = GraphNode(site, gate=0, half=site)
    assert not once.per_sample
    assert once.probability(Rates(skip={0: 0.5}, batch=4)) == 1 - 0.5**4


@pytest.mark.parametrize(
    ("predicted", "skips", "share"), [(0.6, "element", 0.4), (0.6, "tensor", 1.0), (1.0, "tensor", 0.0)]
)
def test_share_of_the_full_weight_gradient(predicted: float, skips: str, share: float) -> None:
    hardware = PredictorHardware(skips=skips)  # type: ignore[arg-type]
    dw = node(4, None, full_dw="w")
    assert dw.probability(Rates(default_use=predicted), hardware) == pytest.approx(share)
    assert dw.probability(Rates(use={"w": predicted}, default_use=0.0), hardware) == pytest.approx(share)


def test_an_unknown_way_of_skipping_is_refused() -> None:
    with pytest.raises(ConfigError, match="'element' or 'tensor'"):
        PredictorHardware(skips="tile")  # type: ignore[arg-type]


@given(st.integers(2, 16), st.integers(2, 16), st.data())
def test_the_remaining_bit_products(x: int, gy: int, data: st.DataObject) -> None:
    """Never fewer than remain, less than one bit of the narrow operand too many, never more than the whole."""
    known = data.draw(st.integers(2, x)) * data.draw(st.integers(2, gy))
    site = OpSite("dw", "aten.mm.default", (TensorSpec((4, 3), x), TensorSpec((3, 4), gy)), (TensorSpec((4, 4)),))
    a, b = remaining(site, known).inputs
    left = x * gy - known
    assert max(left, min(x, gy)) <= a.bits * b.bits < max(left, 1) + 2 * min(x, gy)
    assert a.bits * b.bits <= x * gy
    assert (a.shape, b.shape) == ((4, 3), (3, 4))


def test_the_papers_widths_leave_88_of_128_bit_products() -> None:
    site = OpSite("dw", "aten.mm.default", (TensorSpec((4, 3), 16), TensorSpec((3, 4), 8)), ())
    assert [s.bits for s in remaining(site, 4 * 10).inputs] == [11, 8]


@pytest.fixture(scope="module")
def whole() -> Transformed:
    net = vector_net(vector_residual(16), vector_residual(16))
    return e2pass.transform(net, torch.zeros(BATCH, 12), [None, None])


def priced(t: Transformed, **rates: object) -> CostReport:
    return t._step.report(t._program, Rates(batch=BATCH, **rates))  # type: ignore[arg-type]


def test_stages_start_from_the_baseline_and_end_at_the_transformed_step(whole: Transformed) -> None:
    report = whole.report()
    assert report.transformed is not None
    assert [s.techniques for s in report.stages] == [
        ("smd",), ("smd", "slu"), ("smd", "slu", "bits"), ("smd", "slu", "bits", "psg"),
    ]  # fmt: skip
    assert [s.techniques for s in report.alone] == [("smd",), ("slu",), ("bits",), ("bits", "psg")]
    assert report.stages[-1].totals.energy_j == pytest.approx(report.transformed.energy_j)
    assert report.stages[-1].by_phase["dw"].macs == pytest.approx(report.transformed.by_phase()["dw"].macs)
    assert report.alone[0].totals.energy_j == pytest.approx(report.baseline.energy_j / 2)


def test_a_technique_alone_costs_what_transforming_with_it_alone_does(whole: Transformed) -> None:
    net, x = vector_net(vector_residual(16), vector_residual(16)), torch.zeros(BATCH, 12)
    alone = {s.techniques: s.totals.energy_j for s in whole.report().alone}
    slu = e2pass.analyze(net, x, config="slu")
    assert slu.transformed is not None
    assert slu.transformed.energy_j == pytest.approx(alone[("slu",)], rel=1e-9)
    assert slu.baseline.energy_j == pytest.approx(whole.report().baseline.energy_j, rel=1e-9)
    psg = e2pass.analyze(net, x, config="psg")
    assert psg.transformed is not None
    # Without gates there is one region, and a few values are quantized or kept as codes in other places.
    assert alone[("bits", "psg")] == pytest.approx(psg.transformed.energy_j, rel=0.05)


@settings(max_examples=15, deadline=None)
@given(SHARE, SHARE, SHARE, SHARE)
def test_monotone_in_every_rate(whole: Transformed, low: float, high: float, other: float, use: float) -> None:
    low, high = sorted((low, high))

    def energy(**rates: object) -> float:
        found = priced(whole, **rates).transformed
        assert found is not None
        return found.energy_j

    skips = {0: other, 1: other}
    assert energy(drop=high, skip=skips, default_use=use) <= energy(drop=low, skip=skips, default_use=use)
    for before, after in ((low, high),):
        assert energy(skip={0: after, 1: other}, default_use=use) <= energy(skip={0: before, 1: other}, default_use=use)
        assert energy(skip=skips, default_use=after) <= energy(skip=skips, default_use=before)


@settings(max_examples=5, deadline=None)
@given(SHARE, SHARE, SHARE)
def test_static_energy_follows_the_time(whole: Transformed, drop: float, skip: float, use: float) -> None:
    report = priced(whole, drop=drop, skip={0: skip, 1: skip}, default_use=use)
    assert report.transformed is not None
    whole_time = report.baseline.time_s
    power = report.baseline.by_level()["static"] / whole_time
    assert report.transformed.by_level()["static"] == pytest.approx(power * report.transformed.time_s)


def test_a_block_nobody_enters_costs_nothing_and_is_not_updated(whole: Transformed) -> None:
    step = priced(whole, skip={0: 1.0, 1: 0.0}).transformed
    assert step is not None
    idle = [r for r in step.rows if r.region.startswith("body_") and r.total_j == 0]
    assert len({r.region for r in idle}) == 1
    updates = {r.layer: r.total_j for r in step.rows if r.phase is Phase.UPDATE}
    layers = {r.layer for r in idle} & set(updates)
    assert layers >= {r.layer for r in idle if r.phase is Phase.DW} > set()
    assert {layer for layer, joules in updates.items() if joules == 0} == layers


class Tied(nn.Module):
    """Two residual blocks over one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.head = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = x + torch.relu(self.shared(x))
        x = x + torch.relu(self.shared(x))
        out: torch.Tensor = self.head(x)
        return out


def test_a_weight_of_several_regions_is_summed_signed_and_updated_once() -> None:
    t = e2pass.transform(Tied(), torch.zeros(BATCH, 12), config="psg")
    gated = e2pass.transform(Tied(), torch.zeros(BATCH, 12), [None, None])
    mine = ("weight_sum/shared.weight", "update/shared.weight")
    names = {n.name.partition("/shared.")[2] for n in gated.graph.nodes if n.name.startswith(mine)}
    steps = {"full_0", "predicted_0", "threshold", "select", "sign", "scale_abs", "scale_mean", "scale"}
    assert names == {"weight"} | {f"weight_{step}" for step in steps}
    assert gated.report().coverage.complete
    assert not any(n.name.startswith("weight_sum") for n in t.graph.nodes)  # one region: summed within
