"""Roofline points: arithmetic intensity and rate of every product, beside what the board could do at most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from e2pass.cost import Phase, Technique
from e2pass.step.cost import StepCost


@dataclass(frozen=True)
class Ceilings:
    """What a board could do at most.

    Attributes:
        macs_per_s: MACs per second of the array by operand widths, e.g. ``8 x 16 bit``.
        dram_bytes_per_s: Bandwidth of the off-chip memory.
    """

    macs_per_s: Mapping[str, float]
    dram_bytes_per_s: float


@dataclass(frozen=True)
class RooflinePoint:
    """One product.

    Attributes:
        name: Operation in the training graph.
        layer: Module path.
        phase: Part of the step.
        technique: Who put it there.
        macs_per_byte: MACs per off-chip byte.
        macs_per_s: MACs per second while it runs.
        energy_j: Its joules in a nominal step.
    """

    name: str
    layer: str
    phase: Phase
    technique: Technique
    macs_per_byte: float
    macs_per_s: float
    energy_j: float


def roofline(step: StepCost) -> list[RooflinePoint]:
    """The points of all operations that multiply and accumulate, take time and move bytes."""
    points = []
    for row in step.rows:
        moved = row.traffic_bytes.get(step.dram, 0.0)
        if row.macs > 0 and row.time_s > 0 and moved > 0:
            points.append(
                RooflinePoint(
                    row.name, row.layer, row.phase, row.technique, row.macs / moved, row.macs / row.time_s, row.total_j
                )
            )
    return points
