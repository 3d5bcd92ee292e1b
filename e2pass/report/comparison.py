"""Two cost reports side by side: two boards, two configurations, or yesterday and today."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from e2pass.errors import InputError
from e2pass.report.cost_report import BASIS, CostReport
from e2pass.report.files import save
from e2pass.report.markdown import escaped, section_lines
from e2pass.report.sections import Cell, Section
from e2pass.report.units import si
from e2pass.step.cost import StepCost, Totals

if TYPE_CHECKING:
    from rich.console import Group

SCHEMA = "e2pass/cost-comparison/1"
SHOWN = 12
Which = Literal["transformed", "baseline"]


@dataclass(frozen=True)
class Comparison:
    """What became of the cost of a step from one report to another.

    Attributes:
        which: The steps that are compared: the transformed ones, or the baselines.
        boards: Board of each report.
        before: Step of the first report.
        after: Step of the second.
        assumptions: Assumptions that differ, by key, as the first and the second report state them.
    """

    which: Which
    boards: tuple[str, str]
    before: StepCost
    after: StepCost
    assumptions: Mapping[str, tuple[Any, Any]]

    @property
    def energy_ratio(self) -> float | None:
        """Energy of the second by that of the first; None where the first is zero."""
        return self.after.energy_j / self.before.energy_j if self.before.energy_j else None

    def sections(self) -> Iterator[Section]:
        """Yield the tables: totals, phases, places, and the layers whose energy changed most."""
        yield self._totals()
        yield self._keys("By phase", self.before.by_phase(), self.after.by_phase())
        yield self._keys("By technique", self.before.by_technique(), self.after.by_technique())
        yield self._levels()
        yield self._layers()

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.text import Text

        from e2pass.report.text import render_section

        lines = [Text(line) for line in self._lines()]
        return Group(Text(self.title, style="bold"), *map(render_section, self.sections()), *lines)

    def table(self, width: int = 120) -> str:
        """Return the comparison as text tables, ``width`` characters wide."""
        from e2pass.report.text import to_text

        return to_text(self.__rich__(), width)

    def to_markdown(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the comparison as Markdown, and write it to ``path`` if given."""
        lines = [f"# {escaped(self.title)}", ""]
        for section in self.sections():
            lines += section_lines(section)
        lines += [f"- {escaped(line)}" for line in self._lines()]
        return save("\n".join(lines).rstrip() + "\n", path)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the totals, phases and layers of both as JSON, and write it to ``path`` if given."""
        sides = []
        for board, step in zip(self.boards, (self.before, self.after), strict=True):
            sums = {"by_phase": step.by_phase(), "by_technique": step.by_technique(), "by_layer": step.by_layer()}
            side = {"board": board, "totals": asdict(step.totals), "energy_j_by_level": step.by_level()}
            sides.append(side | {k: {n: asdict(t) for n, t in found.items()} for k, found in sums.items()})
        data = {
            "schema": SCHEMA, "basis": BASIS, "step": self.which, "energy_ratio": self.energy_ratio,
            "a": sides[0], "b": sides[1], "different_assumptions": dict(self.assumptions),
        }  # fmt: skip
        return save(json.dumps(data, indent=1, allow_nan=False, default=str) + "\n", path)

    @property
    def title(self) -> str:
        """Heading."""
        where = self.boards[0] if self.boards[0] == self.boards[1] else f"A on {self.boards[0]}, B on {self.boards[1]}"
        return f"Comparison of two cost reports, {self.which} step, {where} ({BASIS})"

    def _lines(self) -> list[str]:
        return [f"{key}: A {a}; B {b}" for key, (a, b) in self.assumptions.items()]

    def _totals(self) -> Section:
        a, b = self.before.totals, self.after.totals
        rows = [
            _row("energy", a.energy_j, b.energy_j, "J"),
            _row("time", a.time_s, b.time_s, "s"),
            _row("MACs", a.macs, b.macs, ""),
            _row("off-chip traffic", a.dram_bytes, b.dram_bytes, "B"),
        ]
        return Section("Totals", ["", "A", "B", "B / A"], rows)

    def _keys(self, heading: str, a: Mapping[str, Totals], b: Mapping[str, Totals]) -> Section:
        nothing = Totals()
        rows = [
            _row(key, a.get(key, nothing).energy_j, b.get(key, nothing).energy_j, "J")
            for key in dict.fromkeys([*a, *b])
        ]
        return Section(f"{heading}, energy", ["", "A", "B", "B / A"], rows)

    def _levels(self) -> Section:
        a, b = self.before.by_level(), self.after.by_level()
        rows = [_row(key, a.get(key, 0.0), b.get(key, 0.0), "J") for key in dict.fromkeys([*a, *b])]
        return Section("By place, energy", ["", "A", "B", "B / A"], rows)

    def _layers(self) -> Section:
        a = {k: t.energy_j for k, t in self.before.by_layer().items()}
        b = {k: t.energy_j for k, t in self.after.by_layer().items()}
        names = sorted(dict.fromkeys([*a, *b]), key=lambda name: -abs(b.get(name, 0.0) - a.get(name, 0.0)))
        rows = [_row(name or "(no layer)", a.get(name, 0.0), b.get(name, 0.0), "J") for name in names[:SHOWN]]
        left = len(names) - len(rows)
        note = f"{left} more in the JSON form" if left else ""
        return Section("Layers that changed most, energy", ["", "A", "B", "B / A"], rows, note)


def compare(
    a: CostReport | str | os.PathLike[str], b: CostReport | str | os.PathLike[str], which: Which | None = None
) -> Comparison:
    """Compare two reports.

    Args:
        a: A report, or the path or text of one in JSON.
        b: Another.
        which: ``transformed`` or ``baseline`` steps; by default transformed where both have one.

    Raises:
        InputError: If one is no report, or has no transformed step where those were asked for.
    """
    reports = [r if isinstance(r, CostReport) else CostReport.from_json(r) for r in (a, b)]
    if which not in (None, "transformed", "baseline"):
        raise InputError(f"which = {which!r} is not allowed; choose 'transformed' or 'baseline'")
    complete = all(r.transformed is not None for r in reports)
    chosen: Which = which or ("transformed" if complete else "baseline")
    if chosen == "transformed" and not complete:
        raise InputError("one of the reports has no transformed step; compare their baselines")
    before, after = (r.steps[chosen] for r in reports)
    one, other = (dict(r.assumptions) for r in reports)
    keys = [key for key in dict.fromkeys([*one, *other]) if one.get(key) != other.get(key)]
    different = {key: (one.get(key), other.get(key)) for key in keys}
    return Comparison(chosen, (reports[0].board, reports[1].board), before, after, different)


def _row(name: str, a: float, b: float, unit: str) -> list[Cell]:
    ratio = Cell("") if a == 0 else Cell(f"{b / a:.3g}", b / a)
    return [Cell(name), Cell(si(a, unit), a), Cell(si(b, unit), b), ratio]
