"""What a training step and a whole run cost before and after the transformation, and what that saves.

Everything here is modelled, not measured, and says so wherever it is printed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from e2pass.errors import InputError
from e2pass.report.bars import Bar, waterfall
from e2pass.report.files import save
from e2pass.report.rooflines import Ceilings, RooflinePoint, roofline
from e2pass.report.run import RunCost, RunTotals, nominal_steps
from e2pass.step.cost import Coverage, StepCost, coverage_of
from e2pass.step.variant import Variant

if TYPE_CHECKING:
    import os

    from rich.console import Group

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
class CostReport:
    """What one nominal training step costs on a board, before and after the transformation.

    Attributes:
        board: Name of the board.
        baseline: The model as it was, in fp32.
        transformed: The transformed model; None where only an analysis was asked for.
        alone: The step with each technique alone, where a configuration was priced.
        stages: The step with one technique more each time, in the order SMD, SLU, low precision, PSG; the last of them
            is the transformed step.
        batch_size: Samples in a mini-batch, None where it is not known.
        ceilings: What the board could do at most, for a roofline; None where the cost model does not say.
        run: A whole run, where one was asked for with :meth:`with_run`.
        assumptions: What the figures rest on (rates, optimizer, loss, and what the cost model takes for granted).
        sources: Every number of the cost model by key, with where it comes from.
    """

    board: str
    baseline: StepCost
    transformed: StepCost | None = None
    alone: tuple[Variant, ...] = ()
    stages: tuple[Variant, ...] = ()
    batch_size: int | None = None
    ceilings: Ceilings | None = None
    run: RunCost | None = None
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

    @property
    def waterfall(self) -> list[Bar]:
        """What each technique takes off the baseline, one after the other; empty without a configuration."""
        return waterfall(self.baseline.totals, self.stages)

    def roofline(self) -> dict[str, list[RooflinePoint]]:
        """Arithmetic intensity and rate of every product, by step."""
        return {name: roofline(step) for name, step in self.steps.items()}

    def for_run(
        self, steps: int | None = None, *, epochs: int | None = None, dataset_size: int | None = None
    ) -> RunCost:
        """Return the cost of a whole run, given in ``steps`` or as ``epochs`` over ``dataset_size`` samples.

        Args:
            steps: Nominal steps: dropped mini-batches count as steps.
            epochs: Nominal epochs.
            dataset_size: Samples in an epoch; a last partial mini-batch is priced as a whole one.

        Raises:
            InputError: If a number is not a positive whole one, or not exactly one of both ways is used.
        """
        count = nominal_steps(steps, epochs, dataset_size, self.batch_size)
        after = None if self.transformed is None else RunTotals.of(self.transformed.totals, count)
        return RunCost(count, RunTotals.of(self.baseline.totals, count), after)

    def with_run(
        self, steps: int | None = None, *, epochs: int | None = None, dataset_size: int | None = None
    ) -> CostReport:
        """Return this report with a whole run in it, which every format then shows; arguments as for ``for_run``."""
        return replace(self, run=self.for_run(steps, epochs=epochs, dataset_size=dataset_size))

    def __rich__(self) -> Group:
        from e2pass.report.text import render

        return render(self)

    def table(self, width: int = 120) -> str:
        """Return the report as text tables, ``width`` characters wide."""
        from e2pass.report.text import render, to_text

        return to_text(render(self), width)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the whole report as JSON (with a schema version), and write it to ``path`` if given."""
        from e2pass.report.document import to_json

        return save(to_json(self), path)

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return one line for each operation as CSV, unpriced ones included, and write it to ``path`` if given."""
        from e2pass.report.lines import to_csv

        return save(to_csv(self), path)

    def to_markdown(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the summary as Markdown, and write it to ``path`` if given."""
        from e2pass.report.markdown import to_markdown

        return save(to_markdown(self), path)

    def to_latex(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the summary as LaTeX tables (for ``booktabs`` and ``graphicx``), and write it to ``path`` if given."""
        from e2pass.report.latex import to_latex

        return save(to_latex(self), path)

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> CostReport:
        """Read a report back.

        Args:
            source: The text that ``to_json`` returned, or the path of the file it wrote.

        Raises:
            InputError: If it is no report of this schema version.
        """
        from e2pass.report.document import from_json

        if isinstance(source, str) and source.lstrip().startswith("{"):
            return from_json(source)
        try:
            return from_json(Path(source).read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise InputError(f"no cost report can be read from {source}: {why}") from None


def _saved(before: float, after: float) -> float | None:
    return None if before == 0 else 1 - after / before
