"""The expected cost of a training step as data: rows, totals, coverage; and how a cost model is asked for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from e2pass.cost import CostModel, Free, OpCost, OpSite, Phase, Technique, Unsupported


@dataclass(frozen=True)
class CostRow:
    """Expected cost of one operation in one nominal step: the cost of an execution times ``probability``.

    Attributes:
        name: Name of the operation in the training graph.
        op: Operator.
        region: Region of the graph.
        layer: Module path in the user's model, ``""`` where unknown.
        block: Residual block, None outside of any.
        phase: Part of the training step.
        technique: Who put the operation there.
        probability: Expected executions per nominal step.
        macs: Multiply-accumulates.
        alu_ops: Element-wise operations.
        time_s: Seconds.
        energy_j: Joules by where they are spent: ``compute``, each memory level, ``static``.
        traffic_bytes: Bytes by memory level.
        formula: How it was priced.
        saved_write_bytes: Off-chip bytes, part of ``traffic_bytes``, written of activations that backward reads.
        saved_read_bytes: Likewise read by backward of activations that forward saved.
    """

    name: str
    op: str
    region: str
    layer: str
    block: str | None
    phase: Phase
    technique: Technique
    probability: float
    macs: float
    alu_ops: float
    time_s: float
    energy_j: Mapping[str, float]
    traffic_bytes: Mapping[str, float]
    formula: str
    saved_write_bytes: float = 0.0
    saved_read_bytes: float = 0.0

    @property
    def total_j(self) -> float:
        """Joules in all."""
        return sum(self.energy_j.values())


@dataclass(frozen=True)
class FreeOp:
    """An operation declared free, and why."""

    name: str
    op: str
    reason: str


@dataclass(frozen=True)
class UnpricedOp:
    """An operation without a price: why, and what it is estimated to move and multiply.

    The bytes are its operands and results, moved once; the MACs those of a matrix product of such operands where the
    shapes allow one, else one per element of the result. They serve the coverage only, never a total.
    """

    name: str
    op: str
    reason: str
    probability: float
    estimated_bytes: float
    estimated_macs: float


@dataclass(frozen=True)
class Totals:
    """Sums over rows."""

    energy_j: float = 0.0
    time_s: float = 0.0
    macs: float = 0.0
    dram_bytes: float = 0.0

    @property
    def average_power_w(self) -> float:
        """Watts: joules by seconds; 0 where no time passes."""
        return self.energy_j / self.time_s if self.time_s else 0.0

    def plus(self, row: CostRow, dram: str) -> Totals:
        """Return these totals with one more row."""
        return Totals(
            self.energy_j + row.total_j,
            self.time_s + row.time_s,
            self.macs + row.macs,
            self.dram_bytes + row.traffic_bytes.get(dram, 0.0),
        )


@dataclass(frozen=True)
class Coverage:
    """How much of the work has a price. Shares go from 0 to 1; 1 means that nothing was left out.

    Attributes:
        ops: Share of the operations that are priced, or declared free with a reason.
        macs: Share of the MACs (those of unpriced operations are estimated).
        bytes: Share of the off-chip bytes (those of unpriced operations are estimated).
        unpriced: The operations without a price.
    """

    ops: float
    macs: float
    bytes: float
    unpriced: tuple[UnpricedOp, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every operation is priced or declared free."""
        return not self.unpriced


@dataclass(frozen=True)
class StepCost:
    """Expected cost of one nominal training step.

    Attributes:
        rows: Priced operations, in the order of the step.
        free: Operations declared free, and why.
        unpriced: Operations without a price; they are in no total.
        dram: Name of the off-chip memory level.
    """

    rows: tuple[CostRow, ...]
    free: tuple[FreeOp, ...] = ()
    unpriced: tuple[UnpricedOp, ...] = ()
    dram: str = "dram"

    @cached_property
    def totals(self) -> Totals:
        """Sums over all rows."""
        return self._by(lambda row: "").get("", Totals())

    @property
    def energy_j(self) -> float:
        """Joules."""
        return self.totals.energy_j

    @property
    def time_s(self) -> float:
        """Seconds."""
        return self.totals.time_s

    @property
    def macs(self) -> float:
        """Multiply-accumulates."""
        return self.totals.macs

    @property
    def dram_bytes(self) -> float:
        """Bytes that cross the edge of the chip."""
        return self.totals.dram_bytes

    @property
    def saved_bytes(self) -> tuple[float, float]:
        """Off-chip bytes written of activations that the backward half reads, and read of them there.

        Both are part of ``dram_bytes``. More is read than written where tensors do not fit on the chip, or where a
        region's backward half reads what another region wrote.
        """
        return sum(row.saved_write_bytes for row in self.rows), sum(row.saved_read_bytes for row in self.rows)

    def by_phase(self) -> dict[str, Totals]:
        """Return totals by phase, in the order of the step."""
        found = self._by(lambda row: row.phase.value)
        return {phase.value: found[phase.value] for phase in Phase if phase.value in found}

    def by_technique(self) -> dict[str, Totals]:
        """Return totals by who put the operations there."""
        found = self._by(lambda row: row.technique.value)
        return {t.value: found[t.value] for t in Technique if t.value in found}

    def by_layer(self) -> dict[str, Totals]:
        """Return totals by module path; operations of no module are under ``""``."""
        return self._by(lambda row: row.layer)

    def by_block(self) -> dict[str, Totals]:
        """Return totals by residual block; operations outside of any are under ``""``."""
        return self._by(lambda row: row.block or "")

    def by_level(self) -> dict[str, float]:
        """Return joules by where they are spent: compute, each memory level, static."""
        return _sum_maps(row.energy_j for row in self.rows)

    def traffic_by_level(self) -> dict[str, float]:
        """Return bytes by memory level."""
        return _sum_maps(row.traffic_bytes for row in self.rows)

    @property
    def coverage(self) -> Coverage:
        """How much of this step has a price."""
        return coverage_of([self])

    def _by(self, key: Callable[[CostRow], str]) -> dict[str, Totals]:
        found: dict[str, Totals] = {}
        for row in self.rows:
            where = key(row)
            found[where] = found.get(where, Totals()).plus(row, self.dram)
        return found


class UnitPrices:
    """What a cost model answers, each question asked once: operations that differ in name and place cost the same."""

    def __init__(self, model: CostModel) -> None:
        self.model = model
        self._known: dict[Hashable, OpCost | Free | Unsupported] = {}

    def of(self, site: OpSite) -> OpCost | Free | Unsupported:
        """Price of one execution of ``site``."""
        key = (site.op, site.args, tuple(sorted(site.kwargs.items())), site.outputs)
        try:
            if key in self._known:
                return self._known[key]
        except TypeError:  # an argument that cannot be hashed
            return self.model.cost(site)
        return self._known.setdefault(key, self.model.cost(site))


def price_step(sites: Iterable[OpSite], model: CostModel) -> StepCost:
    """Price every operation of a training step; the time is linear in their number.

    Operations that differ only in name and place are priced once.

    Args:
        sites: The operations, each with its expected executions per nominal step.
        model: What prices one execution.
    """
    prices = UnitPrices(model)
    rows: list[CostRow] = []
    free: list[FreeOp] = []
    unpriced: list[UnpricedOp] = []
    for site in sites:
        cost = prices.of(site)
        if isinstance(cost, Free):
            free.append(FreeOp(site.name, site.op, cost.reason))
        elif isinstance(cost, Unsupported):
            unpriced.append(unpriced_op(site, cost.reason, site.probability))
        else:
            rows.append(_row(site, cost))
    return StepCost(tuple(rows), tuple(free), tuple(unpriced), model.dram)


def _row(site: OpSite, cost: OpCost) -> CostRow:
    p = site.probability
    return CostRow(
        **placed(site),
        probability=p,
        macs=cost.macs * p,
        alu_ops=cost.alu_ops * p,
        time_s=cost.time_s * p,
        energy_j={level: joules * p for level, joules in cost.energy_j.items()},
        traffic_bytes={level: moved * p for level, moved in cost.traffic_bytes.items()},
        formula=cost.formula,
        saved_write_bytes=cost.saved_write_bytes * p,
        saved_read_bytes=cost.saved_read_bytes * p,
    )


def placed(site: OpSite) -> dict[str, Any]:
    """The fields of a row that say what and where its operation is."""
    return {
        "name": site.name,
        "op": site.op,
        "region": site.region,
        "layer": site.layer,
        "block": site.block,
        "phase": site.phase,
        "technique": site.technique,
    }


def unpriced_op(site: OpSite, reason: str, probability: float) -> UnpricedOp:
    """What is listed in place of a price."""
    moved = sum(t.bytes for t in (*site.inputs, *site.outputs))
    return UnpricedOp(site.name, site.op, reason, probability, moved * probability, _estimated_macs(site) * probability)


def _estimated_macs(site: OpSite) -> float:
    """``sqrt(|A| |B| |O|)`` is ``m k n`` for a matrix product; element-wise operands all broadcast to the result."""
    result = max(site.outputs, key=lambda t: t.numel, default=None)
    if result is None:
        return 0.0
    others = [t for t in site.inputs if not _broadcasts(t.shape, result.shape)]
    if len(site.inputs) < 2 or not others:
        return float(result.numel)
    largest = sorted((t.numel for t in site.inputs), reverse=True)[:2]
    return math.sqrt(float(largest[0]) * largest[1] * result.numel)


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    return len(shape) <= len(to) and all(s in (1, t) for s, t in zip(shape[::-1], to[::-1], strict=False))


def coverage_of(steps: Iterable[StepCost]) -> Coverage:
    """Return how much of several steps together has a price."""
    counted = list(steps)
    unpriced = tuple(op for step in counted for op in step.unpriced)
    known = sum(len(step.rows) + len(step.free) for step in counted)
    return Coverage(
        _share(known, len(unpriced)),
        _share(sum(step.macs for step in counted), sum(op.estimated_macs for op in unpriced)),
        _share(sum(step.dram_bytes for step in counted), sum(op.estimated_bytes for op in unpriced)),
        unpriced,
    )


def _share(known: float, unknown: float) -> float:
    return 1.0 if unknown == 0 else known / (known + unknown)


def _sum_maps(maps: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for entry in maps:
        for key, value in entry.items():
            total[key] = total.get(key, 0.0) + value
    return total
