"""What a report says, as tables of cells: every format writes the same ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from e2pass.cost import Phase
from e2pass.report.bars import waterfall
from e2pass.report.cells import pivot
from e2pass.report.cost_report import BASIS, CostReport
from e2pass.report.units import duration, percent, si
from e2pass.step.cost import StepCost, Totals

SHOWN_UNPRICED = 12
SHOWN_LAYERS = 12


class Cell(NamedTuple):
    """A text and, for formats that sort, its number."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Section:
    """A table with a heading; the first column is text, the others mostly numbers.

    Attributes:
        heading: What it shows.
        header: Name of each column.
        rows: Cells, as many as there are columns.
        note: What one must know to read it.
    """

    heading: str
    header: list[str]
    rows: list[list[Cell]]
    note: str = ""

    def is_text(self, column: int) -> bool:
        """Whether a column holds names rather than numbers."""
        cells = [row[column] for row in self.rows]
        return column == 0 or (all(c.value is None for c in cells) and any(c.text for c in cells))


def title(report: CostReport) -> str:
    """Heading of the whole report."""
    return f"Training cost on {report.board}, one nominal step ({BASIS})"


def sections(report: CostReport, shown: int | None = SHOWN_LAYERS) -> Iterator[Section]:
    """Yield the tables.

    Args:
        report: What to show.
        shown: How many layers and blocks at most; None for all.
    """
    yield _totals(report)
    if report.run is not None:
        yield _run(report)
    if report.alone:
        yield _alone(report)
        yield _waterfall(report)
    yield _breakdown(report, "By phase", {n: s.by_phase() for n, s in report.steps.items()})
    yield _breakdown(report, "By technique", {n: s.by_technique() for n, s in report.steps.items()})
    yield _levels(report)
    if report.transformed is not None:
        yield _phases_and_techniques(report.transformed)
    yield _places(report, "layer", {n: s.by_layer() for n, s in report.steps.items()}, shown)
    yield _places(report, "block", {n: s.by_block() for n, s in report.steps.items()}, shown)


def coverage_lines(report: CostReport) -> list[str]:
    """How much has a price, and what has none."""
    c = report.coverage
    lines = [f"coverage: {c.ops:.1%} of the operations, {c.macs:.1%} of the MACs and {c.bytes:.1%} of the bytes priced"]
    counts: dict[tuple[str, str], int] = {}
    for op in c.unpriced:
        counts[op.op, op.reason] = counts.get((op.op, op.reason), 0) + 1
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    lines += [f"not priced: {count} x {op}: {reason}" for (op, reason), count in ordered[:SHOWN_UNPRICED]]
    if len(ordered) > SHOWN_UNPRICED:
        lines.append(f"not priced: {len(ordered) - SHOWN_UNPRICED} more kinds, listed in the JSON and CSV reports")
    return lines


def assumption_lines(report: CostReport) -> list[str]:
    """What the figures rest on."""
    return [f"{key}: {value}" for key, value in report.assumptions.items()]


def _quantity(value: float, unit: str) -> Cell:
    return Cell(si(value, unit), value)


def _share(part: float, whole: float) -> Cell:
    return Cell(f"{part / whole:.1%}", part / whole) if whole else Cell("")


def _saving(before: float, after: float) -> Cell:
    return Cell("") if before == 0 else Cell(percent(1 - after / before), 1 - after / before)


Figure = tuple[str, Callable[[Totals], float], str]


def _figures(report: CostReport) -> list[Figure]:
    return [
        ("energy", lambda t: t.energy_j, "J"),
        ("time", lambda t: t.time_s, "s"),
        ("average power", lambda t: t.average_power_w, "W"),
        ("MACs", lambda t: t.macs, ""),
        (f"{report.baseline.dram} traffic", lambda t: t.dram_bytes, "B"),
    ]


def _totals(report: CostReport) -> Section:
    header, rows = ["", *report.steps], []
    for name, value, unit in _figures(report):
        values = [value(step.totals) for step in report.steps.values()]
        row = [Cell(name), *(_quantity(v, unit) for v in values)]
        if report.transformed is not None:
            row.append(Cell("") if unit == "W" else _saving(*values))
        rows.append(row)
    return Section("Totals", [*header, "saving"] if report.transformed is not None else header, rows)


def _run(report: CostReport) -> Section:
    assert report.run is not None
    run = report.run
    both = {"baseline": run.baseline, "transformed": run.transformed}
    found = {name: totals for name, totals in both.items() if totals is not None}
    rows = [
        [Cell("energy"), *(_quantity(t.energy_j, "J") for t in found.values())],
        [Cell("energy in kWh"), *(Cell(f"{t.energy_kwh:.4g}", t.energy_kwh) for t in found.values())],
        [Cell("time"), *(Cell(duration(t.time_s), t.time_s) for t in found.values())],
    ]
    return Section(f"Whole run of {run.steps:,} nominal steps", ["", *found], rows)


def _alone(report: CostReport) -> Section:
    base = report.baseline.totals
    rows = [
        [
            Cell(v.name), _quantity(v.totals.energy_j, "J"), _saving(base.energy_j, v.totals.energy_j),
            _quantity(v.totals.time_s, "s"), _saving(base.time_s, v.totals.time_s), _quantity(v.totals.macs, ""),
        ]
        for v in report.alone
    ]  # fmt: skip
    header = ["technique", "energy", "energy saved", "time", "time saved", "MACs"]
    return Section("Each technique alone", header, rows, "PSG predicts from the codes of low precision and includes it")


def _waterfall(report: CostReport) -> Section:
    base = report.baseline.totals
    rows = [[Cell("baseline"), _quantity(base.energy_j, "J"), Cell(""), Cell(""), _quantity(base.time_s, "s")]]
    for bar in waterfall(base, report.stages):
        before, after = bar.before.energy_j, bar.after.energy_j
        rows.append(
            [
                Cell(f"+ {bar.technique}"), _quantity(after, "J"), _saving(before, after),
                _share(before - after, base.energy_j), _quantity(bar.after.time_s, "s"),
            ]
        )  # fmt: skip
    header = ["one more each time", "energy", "of the step before", "of the baseline", "time"]
    return Section("Waterfall", header, rows, "in this order; what a technique saves depends on those before it")


def _breakdown(report: CostReport, heading: str, by_step: Mapping[str, Mapping[str, Totals]]) -> Section:
    header = [heading.removeprefix("By ")]
    for name in by_step:
        header += [f"{name} energy", "share", "time", "MACs"]
    rows = []
    for key in dict.fromkeys(key for found in by_step.values() for key in found):
        row = [Cell(key)]
        for name, found in by_step.items():
            totals, whole = found.get(key, Totals()), report.steps[name].energy_j
            row += [_quantity(totals.energy_j, "J"), _share(totals.energy_j, whole)]
            row += [_quantity(totals.time_s, "s"), _quantity(totals.macs, "")]
        rows.append(row)
    return Section(heading, header, rows)


def _levels(report: CostReport) -> Section:
    header = ["where"]
    for name in report.steps:
        header += [f"{name} energy", "share", "bytes"]
    rows = []
    for key in dict.fromkeys(k for step in report.steps.values() for k in step.by_level()):
        row = [Cell(key)]
        for step in report.steps.values():
            joules, moved = step.by_level().get(key, 0.0), step.traffic_by_level().get(key)
            row += [_quantity(joules, "J"), _share(joules, step.energy_j)]
            row.append(Cell("") if moved is None else _quantity(moved, "B"))
        rows.append(row)
    return Section("By place", header, rows)


def _phases_and_techniques(step: StepCost) -> Section:
    """Phase by technique by place, of the transformed step."""
    places = list(step.by_level())
    header = [
        "phase",
        "technique",
        "energy",
        *(f"in {place}" for place in places),
        "time",
        f"{step.dram} bytes",
        "MACs",
    ]
    rows = []
    order = {phase.value: i for i, phase in enumerate(Phase)}
    for cell in sorted(pivot(step, "phase", "technique"), key=lambda cell: order[cell.key[0]]):
        energy = [_quantity(cell.energy_j.get(place, 0.0), "J") for place in places]
        row = [Cell(cell.key[0]), Cell(cell.key[1]), _quantity(cell.total_j, "J"), *energy, _quantity(cell.time_s, "s")]
        row += [_quantity(cell.traffic_bytes.get(step.dram, 0.0), "B"), _quantity(cell.macs, "")]
        rows.append(row)
    return Section("By phase, technique and place, transformed step", header, rows)


def _places(report: CostReport, kind: str, by_step: Mapping[str, Mapping[str, Totals]], shown: int | None) -> Section:
    """Layers or blocks, the most expensive ones of the baseline first."""
    before, whole = by_step["baseline"], report.baseline.energy_j
    names = list(dict.fromkeys(key for found in by_step.values() for key in found))
    names.sort(key=lambda name: -before.get(name, Totals()).energy_j)
    header = [kind, "baseline energy", "share", "time", "MACs"]
    header += ["transformed energy", "energy saved"] if report.transformed is not None else []
    rows = []
    for name in names[:shown]:
        t = before.get(name, Totals())
        row = [Cell(name or f"(no {kind})"), _quantity(t.energy_j, "J"), _share(t.energy_j, whole)]
        row += [_quantity(t.time_s, "s"), _quantity(t.macs, "")]
        if report.transformed is not None:
            after = by_step["transformed"].get(name, Totals()).energy_j
            row += [_quantity(after, "J"), _saving(t.energy_j, after)]
        rows.append(row)
    left = len(names) - len(rows)
    note = f"{left} more are in the JSON, CSV and HTML reports" if left > 0 else ""
    return Section(f"By {kind}" if left <= 0 else f"By {kind}, the {len(rows)} largest", header, rows, note)
