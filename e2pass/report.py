"""What a training step and a whole run cost before and after the transformation, and what that saves.

Everything here is modelled, not measured, and says so wherever it is printed (``e2pass.report_formats``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from e2pass.errors import InputError
from e2pass.step_cost import (
    CostRow,
    Coverage,
    FreeOp,
    StepCost,
    Totals,
    UnpricedOp,
    coverage_of,
    price_step,
)
from e2pass.variant import Variant

if TYPE_CHECKING:
    import os

    from rich.console import Group

__all__ = [
    "BASIS",
    "CostReport",
    "CostRow",
    "Coverage",
    "FreeOp",
    "RunCost",
    "RunTotals",
    "Saving",
    "StepCost",
    "Totals",
    "UnpricedOp",
    "price_step",
]

BASIS = "modelled, not measured"


@dataclass(frozen=True)
class Saving:
    """Share of the baseline that is saved, from 0 (nothing) to 1; negative where the transformed step costs more.

    None where there is nothing to compare: no transformed step, or a baseline of zero.
    """

    energy: float | None = None
    time: float | None = None
    macs: float | None = None
    dram: float | None = None


@dataclass(frozen=True)
class RunTotals:
    """Cost of a whole run."""

    energy_j: float
    time_s: float
    macs: float
    dram_bytes: float

    @property
    def energy_kj(self) -> float:
        """Kilojoules."""
        return self.energy_j / 1e3

    @property
    def energy_kwh(self) -> float:
        """Kilowatt-hours."""
        return self.energy_j / 3.6e6

    @property
    def hours(self) -> float:
        """Hours."""
        return self.time_s / 3600

    @property
    def average_power_w(self) -> float:
        """Watts, averaged over the run; 0 for an empty one."""
        return self.energy_j / self.time_s if self.time_s else 0.0


@dataclass(frozen=True)
class RunCost:
    """Cost of ``steps`` nominal steps, without and with the transformation. Modelled, not measured."""

    steps: int
    baseline: RunTotals
    transformed: RunTotals | None


@dataclass(frozen=True)
class CostReport:
    """What one nominal training step costs on a board, before and after the transformation.

    Attributes:
        board: Name of the board.
        baseline: The model as it was, in fp32.
        transformed: The transformed model; None where only an analysis was asked for.
        alone: The step with each technique alone, where a configuration was priced.
        stages: The step with one technique more each time, in the order SMD, SLU, low precision, PSG; the last of them
            is the transformed step.
        assumptions: What the figures rest on (rates, optimizer, loss, and what the cost model takes for granted).
        sources: Every number of the cost model by key, with where it comes from.
    """

    board: str
    baseline: StepCost
    transformed: StepCost | None = None
    alone: tuple[Variant, ...] = ()
    stages: tuple[Variant, ...] = ()
    assumptions: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def saving(self) -> Saving:
        """What the transformation saves of each quantity."""
        if self.transformed is None:
            return Saving()
        before, after = self.baseline.totals, self.transformed.totals
        return Saving(
            _saved(before.energy_j, after.energy_j),
            _saved(before.time_s, after.time_s),
            _saved(before.macs, after.macs),
            _saved(before.dram_bytes, after.dram_bytes),
        )

    @property
    def coverage(self) -> Coverage:
        """How much of both steps has a price."""
        return coverage_of(self.steps.values())

    @property
    def steps(self) -> dict[str, StepCost]:
        """The priced steps by name: ``baseline``, and ``transformed`` where there is one."""
        both = {"baseline": self.baseline, "transformed": self.transformed}
        return {name: step for name, step in both.items() if step is not None}

    def for_run(self, steps: int) -> RunCost:
        """Return the cost of a run of ``steps`` nominal steps (dropped mini-batches count as steps).

        Raises:
            InputError: If ``steps`` is not a positive whole number.
        """
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise InputError(f"steps = {steps!r} is not allowed: give a whole number of at least 1")
        after = None if self.transformed is None else _run(self.transformed.totals, steps)
        return RunCost(steps, _run(self.baseline.totals, steps), after)

    def __rich__(self) -> Group:
        from e2pass import report_formats

        return report_formats.render(self)

    def table(self, width: int = 120) -> str:
        """Return the report as text tables, ``width`` characters wide."""
        from e2pass import report_formats

        return report_formats.to_text(self, width)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the whole report as JSON (with a schema version), and write it to ``path`` if given."""
        from e2pass import report_formats

        return report_formats.save(report_formats.to_json(self), path)

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return one line for each operation as CSV, unpriced ones included, and write it to ``path`` if given."""
        from e2pass import report_formats

        return report_formats.save(report_formats.to_csv(self), path)

    def to_markdown(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the summary as Markdown, and write it to ``path`` if given."""
        from e2pass import report_formats

        return report_formats.save(report_formats.to_markdown(self), path)

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> CostReport:
        """Read a report back.

        Args:
            source: The text that ``to_json`` returned, or the path of the file it wrote.

        Raises:
            InputError: If it is no report of this schema version.
        """
        from e2pass import report_formats

        text = (
            source if isinstance(source, str) and source.lstrip().startswith("{") else Path(source).read_text("utf-8")
        )
        return report_formats.from_json(text)


def _saved(before: float, after: float) -> float | None:
    return None if before == 0 else 1 - after / before


def _run(step: Totals, steps: int) -> RunTotals:
    return RunTotals(step.energy_j * steps, step.time_s * steps, step.macs * steps, step.dram_bytes * steps)
