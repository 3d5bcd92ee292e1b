"""A cost report as a fragment of a page, and as a page of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

from markupsafe import Markup

from e2pass.backends.html.charts import charts
from e2pass.backends.html.page import Fragment, asset, environment, page
from e2pass.report import CostReport, save, si
from e2pass.report.sections import Cell, Section, coverage_lines, sections, title
from e2pass.report.units import duration, percent

LARGEST = 300
"""Operations in the table of single ones; all of them are in the JSON and CSV reports."""


class _Card(NamedTuple):
    label: str
    value: str
    detail: str


def to_html(report: CostReport, path: str | os.PathLike[str] | None = None) -> str:
    """Return the report as a self-contained page, and write it to ``path`` if given."""
    return save(page(title(report), [cost_fragment(report)]), path)


def cost_fragment(report: CostReport, prefix: str = "cost") -> Fragment:
    """The report with its charts and tables, for a page.

    Args:
        report: What to show.
        prefix: Id of its element, and the beginning of the ids within.
    """
    body = environment().get_template("cost.html.j2").render(
        report=report,
        prefix=prefix,
        cards=list(_cards(report)),
        charts=list(charts(report)),
        tables=[*sections(report, shown=None), *_operations(report)],
        coverage=coverage_lines(report),
    )  # fmt: skip
    return Fragment(
        Markup(body),
        styles=(asset("static/theme.css"), asset("static/report.css")),
        scripts=(
            asset("vendor/echarts.common.min.js"),
            asset("vendor/sortable.min.js"),
            asset("static/charts.js"),
        ),
    )


def _cards(report: CostReport) -> Iterator[_Card]:
    before, after = report.baseline.totals, None if report.transformed is None else report.transformed.totals
    yield _Card("baseline, fp32", si(before.energy_j, "J"), f"{duration(before.time_s)} a step")
    if after is not None:
        yield _Card("transformed", si(after.energy_j, "J"), f"{duration(after.time_s)} a step")
        saving = report.saving
        yield _Card("energy saved", percent(saving.energy), f"time saved {percent(saving.time)}")
    shown = before if after is None else after
    yield _Card("average power", si(shown.average_power_w, "W"), f"{si(shown.macs, 'MAC')} a step")
    if report.run is not None:
        run = report.run.transformed or report.run.baseline
        was = "" if report.run.transformed is None else f", instead of {si(report.run.baseline.energy_j, 'J')}"
        yield _Card(f"run of {report.run.steps:,} steps", si(run.energy_j, "J"), f"{duration(run.time_s)}{was}")
    coverage = report.coverage
    yield _Card("coverage", percent(coverage.ops), f"of the operations, {percent(coverage.macs)} of the MACs")


def _operations(report: CostReport) -> Iterator[Section]:
    """The most expensive operations of the last step, one by one."""
    name, step = list(report.steps.items())[-1]
    rows = sorted(step.rows, key=lambda row: -row.total_j)[:LARGEST]
    header = ["operation", "operator", "layer", "phase", "technique", "executions", "energy", "time", "MACs"]
    header += [f"{step.dram} bytes", "priced as"]
    table = [
        [
            Cell(row.name), Cell(row.op), Cell(row.layer), Cell(row.phase.value), Cell(row.technique.value),
            Cell(f"{row.probability:.3g}", row.probability), Cell(si(row.total_j, "J"), row.total_j),
            Cell(si(row.time_s, "s"), row.time_s), Cell(si(row.macs, ""), row.macs),
            Cell(si(moved, "B"), moved), Cell(row.formula),
        ]
        for row, moved in ((row, row.traffic_bytes.get(step.dram, 0.0)) for row in rows)
    ]  # fmt: skip
    if rows:
        share = sum(row.total_j for row in rows) / step.energy_j if step.energy_j else 1.0
        left = len(step.rows) - len(rows)
        note = f"{percent(share)} of the energy; {left} smaller ones are in the JSON and CSV reports" if left else ""
        yield Section(f"Operations of the {name} step", header, table, note)
