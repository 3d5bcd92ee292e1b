"""The price of a training step at any rates, from prices that are asked for once.

Every quantity is linear in what happens: ``once`` a batch, times what an operation costs before its first sample
(reading, quantizing and updating weights), plus ``each`` sample, times what one more adds. So a step at other rates,
or with fewer techniques, is one sum over columns of numbers, and nothing is lowered or mapped again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from e2pass.cost import Free, OpCost, OpSite, Phase, Technique, Unsupported
from e2pass.step.cost import CostRow, FreeOp, StepCost, Totals, UnitPrices, placed, unpriced_op
from e2pass.step.node import GraphNode
from e2pass.step.rates import PredictorHardware, Rates, remaining
from e2pass.step.variant import Variant

Array = NDArray[np.float64]
FIXED = 5  # columns before those of the levels: MACs, element-wise operations, seconds, saved bytes both ways


@dataclass(frozen=True)
class _Groups:
    """Which group each node belongs to.

    Attributes:
        keys: The groups, in the order of their first node.
        codes: Index into ``keys`` for each node.
        first: Index of the first node of each group.
    """

    keys: list[Any]
    codes: NDArray[np.int64]
    first: list[int]

    @classmethod
    def of(cls, keys: Sequence[Any]) -> _Groups:
        first: dict[Any, int] = {}
        for i, key in enumerate(keys):
            first.setdefault(key, i)
        position = {key: i for i, key in enumerate(first)}
        return cls(list(first), np.array([position[k] for k in keys], dtype=np.int64), list(first.values()))


@dataclass(frozen=True)
class _Units:
    """Costs of one execution of each node: whole, and split into two (nodes, columns)."""

    costs: list[OpCost]
    once: Array
    each: Array


class PricedNodes:
    """The operations of one step with their unit prices.

    Args:
        nodes: The operations, in the order of the step.
        prices: Where unit prices come from; shared between steps.
        batch: Batch size of the nodes; ``half`` of a node is on ``batch // 2``.
        known_bits: Bit products of a weight gradient that its predictor has computed.
    """

    def __init__(self, nodes: Sequence[GraphNode], prices: UnitPrices, batch: int, known_bits: int = 0) -> None:
        self.dram = prices.model.dram
        self._prices, self._batch, self._known_bits = prices, batch, known_bits
        self.priced: list[GraphNode] = []
        self.costs: list[OpCost] = []
        self.free: list[tuple[GraphNode, Free]] = []
        self.unpriced: list[tuple[GraphNode, Unsupported]] = []
        for node in nodes:
            cost = prices.of(node.site)
            if isinstance(cost, OpCost):
                self.priced.append(node)
                self.costs.append(cost)
            elif isinstance(cost, Free):
                self.free.append((node, cost))
            else:
                self.unpriced.append((node, cost))
        self.energy = list(dict.fromkeys(k for c in self.costs for k in c.energy_j))
        self.traffic = list(dict.fromkeys(k for c in self.costs for k in c.traffic_bytes))
        self._units: dict[bool, _Units] = {}
        self._technique = np.array([n.site.technique.value for n in self.priced], dtype=str)
        # Many nodes happen equally often: one representative for each way is asked.
        self._ways = _Groups.of([(n.site.probability, n.gate, n.full_dw, n.coasts) for n in self.priced])
        self._groups = {
            "total": _Groups.of(["" for _ in self.priced]),
            "phase": _Groups.of([n.site.phase.value for n in self.priced]),
            "technique": _Groups.of([n.site.technique.value for n in self.priced]),
            "layer": _Groups.of([n.site.layer for n in self.priced]),
            "block": _Groups.of([n.site.block or "" for n in self.priced]),
        }

    def step(self, rates: Rates, techniques: Collection[str], hardware: PredictorHardware) -> StepCost:
        """Expected cost of a step with only these techniques, one row an operation."""
        rates = rates.only(techniques)
        present = self._present(techniques)
        figures = self._expected(rates, hardware)[present]
        costs = self._unit_costs(hardware.reuse).costs
        rows = tuple(
            self._row(self.priced[i], costs[i], row, self.priced[i].probability(rates, hardware))
            for i, row in zip(np.flatnonzero(present).tolist(), figures.tolist(), strict=True)
        )
        return StepCost(
            rows,
            tuple(FreeOp(n.name, n.site.op, c.reason) for n, c in self.free if _present(n, techniques)),
            tuple(
                unpriced_op(n.site, c.reason, n.probability(rates, hardware))
                for n, c in self.unpriced
                if _present(n, techniques)
            ),
            self.dram,
        )

    def variant(self, rates: Rates, techniques: Sequence[str], hardware: PredictorHardware) -> Variant:
        """The same as sums only: what an ablation compares."""
        present = self._present(techniques)
        figures = self._expected(rates.only(techniques), hardware)
        figures[~present] = 0.0
        first = FIXED + len(self.energy)

        def by(key: str) -> dict[str, Totals]:
            return self._sums(figures, self._groups[key], present)

        return Variant(
            techniques=tuple(techniques),
            totals=by("total").get("", Totals()),
            by_phase=_in_order(Phase, by("phase")),
            by_technique=_in_order(Technique, by("technique")),
            by_layer=by("layer"),
            by_block=by("block"),
            by_level=dict(zip(self.energy, figures[:, FIXED:first].sum(0).tolist(), strict=True)),
            traffic_by_level=dict(zip(self.traffic, figures[:, first:].sum(0).tolist(), strict=True)),
        )

    def _expected(self, rates: Rates, hardware: PredictorHardware) -> Array:
        """Expected quantities, (nodes, columns)."""
        asked = [self.priced[i].executions(rates, hardware) for i in self._ways.first]
        often = np.array(asked).reshape(-1, 2)[self._ways.codes]
        units = self._unit_costs(hardware.reuse)
        return often[:, :1] * units.once + often[:, 1:] * units.each

    def _present(self, techniques: Collection[str]) -> NDArray[np.bool_]:
        return np.isin(self._technique, [Technique.BASE.value, *techniques])

    def _unit_costs(self, reuse: bool) -> _Units:
        """Costs before the first sample, and those of the samples: a line through whole and half a batch."""
        if reuse not in self._units:
            costs = list(self.costs)
            if reuse:
                costs = [self._continued(n, n.site, cost) for n, cost in zip(self.priced, costs, strict=True)]
            whole, b, h = self._columns(costs), self._batch, self._batch // 2
            once = np.zeros_like(whole)
            gated = [i for i, node in enumerate(self.priced) if node.half is not None]
            if gated:
                half = self._columns([self._half(self.priced[i], costs[i], reuse) for i in gated])
                once[gated] = np.clip((b * half - h * whole[gated]) / (b - h), 0.0, whole[gated])
            self._units[reuse] = _Units(costs, once, whole - once)
        return self._units[reuse]

    def _half(self, node: GraphNode, whole: OpCost, reuse: bool) -> OpCost:
        assert node.half is not None
        half = self._prices.of(node.half)
        if not isinstance(half, OpCost):
            return whole
        return self._continued(node, node.half, half) if reuse else half

    def _continued(self, node: GraphNode, site: OpSite, cost: OpCost) -> OpCost:
        """Cost of a full weight gradient that continues its predictor's product; of anything else its own."""
        if not node.full_dw:
            return cost
        rest = self._prices.of(remaining(site, self._known_bits))
        return rest if isinstance(rest, OpCost) else cost

    def _columns(self, costs: Sequence[OpCost]) -> Array:
        rows = [
            [
                cost.macs, cost.alu_ops, cost.time_s, cost.saved_write_bytes, cost.saved_read_bytes,
                *(cost.energy_j.get(k, 0.0) for k in self.energy),
                *(cost.traffic_bytes.get(k, 0.0) for k in self.traffic),
            ]
            for cost in costs
        ]  # fmt: skip
        return np.array(rows).reshape(len(costs), FIXED + len(self.energy) + len(self.traffic))

    def _row(self, node: GraphNode, cost: OpCost, figures: list[float], probability: float) -> CostRow:
        macs, alu_ops, time_s, saved_write_bytes, saved_read_bytes, *levels = figures
        cut = len(self.energy)
        return CostRow(
            **placed(node.site),
            probability=probability,
            macs=macs,
            alu_ops=alu_ops,
            time_s=time_s,
            energy_j={k: v for k, v in zip(self.energy, levels[:cut], strict=True) if k in cost.energy_j},
            traffic_bytes={k: v for k, v in zip(self.traffic, levels[cut:], strict=True) if k in cost.traffic_bytes},
            formula=cost.formula,
            saved_write_bytes=saved_write_bytes,
            saved_read_bytes=saved_read_bytes,
        )

    def _sums(self, figures: Array, groups: _Groups, present: NDArray[np.bool_]) -> dict[str, Totals]:
        sums = np.zeros((len(groups.keys), figures.shape[1]))
        np.add.at(sums, groups.codes, figures)
        first = FIXED + len(self.energy)
        dram = sums[:, first + self.traffic.index(self.dram)] if self.dram in self.traffic else np.zeros(len(sums))
        found = np.stack([sums[:, FIXED:first].sum(1), sums[:, 2], sums[:, 0], dram], axis=1).tolist()
        there = set(groups.codes[present].tolist())
        return {key: Totals(*found[i]) for i, key in enumerate(groups.keys) if i in there}


def _present(node: GraphNode, techniques: Collection[str]) -> bool:
    return node.site.technique is Technique.BASE or node.site.technique.value in techniques


def _in_order(order: Any, found: dict[str, Totals]) -> dict[str, Totals]:
    return {key.value: found[key.value] for key in order if key.value in found}
