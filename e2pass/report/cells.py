"""Rows of a step, summed over any combination of layer, block, phase, technique and operator, by memory level."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from e2pass.errors import InputError
from e2pass.step.cost import CostRow, StepCost

DIMENSIONS: Mapping[str, Callable[[CostRow], str]] = {
    "name": lambda row: row.name,
    "op": lambda row: row.op,
    "region": lambda row: row.region,
    "layer": lambda row: row.layer,
    "block": lambda row: row.block or "",
    "phase": lambda row: row.phase.value,
    "technique": lambda row: row.technique.value,
}
"""What rows can be summed by."""


@dataclass
class Cell:
    """Expected sums over the rows that share a key.

    Attributes:
        key: Values of the dimensions, in the order in which they were asked for.
        rows: How many rows are in it.
        energy_j: Joules by where they are spent.
        time_s: Seconds.
        macs: Multiply-accumulates.
        alu_ops: Element-wise operations.
        traffic_bytes: Bytes by memory level.
    """

    key: tuple[str, ...]
    rows: int = 0
    energy_j: dict[str, float] = field(default_factory=dict)
    time_s: float = 0.0
    macs: float = 0.0
    alu_ops: float = 0.0
    traffic_bytes: dict[str, float] = field(default_factory=dict)

    @property
    def total_j(self) -> float:
        """Joules in all."""
        return sum(self.energy_j.values())

    def add(self, row: CostRow) -> None:
        """Add one row."""
        self.rows += 1
        self.time_s += row.time_s
        self.macs += row.macs
        self.alu_ops += row.alu_ops
        for level, joules in row.energy_j.items():
            self.energy_j[level] = self.energy_j.get(level, 0.0) + joules
        for level, moved in row.traffic_bytes.items():
            self.traffic_bytes[level] = self.traffic_bytes.get(level, 0.0) + moved


def pivot(step: StepCost, *by: str) -> list[Cell]:
    """Sum the rows of ``step`` by one or more of ``DIMENSIONS``, in the order of their first row.

    Raises:
        InputError: For an unknown dimension.
    """
    unknown = [name for name in by if name not in DIMENSIONS]
    if unknown:
        raise InputError(f"rows cannot be summed by {unknown[0]!r}; choose from {', '.join(DIMENSIONS)}")
    keys = [DIMENSIONS[name] for name in by]
    cells: dict[tuple[str, ...], Cell] = {}
    for row in step.rows:
        where = tuple(key(row) for key in keys)
        cells.setdefault(where, Cell(where)).add(row)
    return list(cells.values())
