"""A step with some of the techniques, as sums: what the ablation compares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from e2pass.step.cost import Totals

NAMES: Mapping[str, str] = {"smd": "SMD", "slu": "SLU", "bits": "low precision", "psg": "PSG"}
"""How each technique is called in reports."""


@dataclass(frozen=True)
class Variant:
    """Expected cost of one nominal step with ``techniques`` and no others.

    Attributes:
        techniques: Which act, in the order of the waterfall; none is the baseline. PSG implies low precision.
        totals: Sums over all operations.
        by_phase: Sums by part of the step.
        by_technique: Sums by who put the operations there.
        by_layer: Sums by module path, ``""`` for operations of no module.
        by_block: Sums by residual block, ``""`` outside of any.
        by_level: Joules by where they are spent.
        traffic_by_level: Bytes by memory level.
    """

    techniques: tuple[str, ...]
    totals: Totals
    by_phase: Mapping[str, Totals]
    by_technique: Mapping[str, Totals]
    by_layer: Mapping[str, Totals]
    by_block: Mapping[str, Totals]
    by_level: Mapping[str, float]
    traffic_by_level: Mapping[str, float]

    @property
    def name(self) -> str:
        """For headings, e.g. ``SMD + SLU``."""
        return " + ".join(NAMES[t] for t in self.techniques) or "baseline"
