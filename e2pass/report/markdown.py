"""A report as Markdown."""

from __future__ import annotations

from collections.abc import Iterable

from e2pass.report.cost_report import CostReport
from e2pass.report.sections import Section, assumption_lines, coverage_lines, sections, title

_SPECIAL = str.maketrans({c: f"\\{c}" for c in "\\`*_|<>[]"} | {"\n": " "})


def to_markdown(report: CostReport) -> str:
    """Return the summary as Markdown."""
    lines = [f"# {escaped(title(report))}", ""]
    for section in sections(report):
        lines += section_lines(section)
    lines += ["## Coverage", "", *(f"- {escaped(line)}" for line in coverage_lines(report)), ""]
    lines += ["## Assumptions", "", *(f"- {escaped(line)}" for line in assumption_lines(report)), ""]
    return "\n".join(lines)


def section_lines(section: Section) -> list[str]:
    """The lines of one table under its heading."""
    lines = [f"## {escaped(section.heading)}", "", _row(section.header)]
    lines.append("| " + " | ".join(["---"] + ["---:"] * (len(section.header) - 1)) + " |")
    lines += [_row(cell.text for cell in row) for row in section.rows]
    return [*lines, "", *([f"({escaped(section.note)})", ""] if section.note else [])]


def escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    return text.translate(_SPECIAL)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(escaped(cell) for cell in cells) + " |"
