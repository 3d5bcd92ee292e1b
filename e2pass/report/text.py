"""A report as text tables."""

from __future__ import annotations

import io

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from e2pass.report.cost_report import CostReport
from e2pass.report.sections import Section, assumption_lines, coverage_lines, sections, title


def to_text(shown: RenderableType, width: int) -> str:
    """Return what a console of ``width`` characters would show, without colours."""
    buffer = io.StringIO()
    Console(file=buffer, width=width, color_system=None).print(shown)
    return buffer.getvalue()


def render(report: CostReport) -> Group:
    """Return the tables for a rich console."""
    parts: list[RenderableType] = [Text(title(report), style="bold")]
    parts += [render_section(section) for section in sections(report)]
    parts.extend(Text(line) for line in (*coverage_lines(report), *assumption_lines(report)))
    return Group(*parts)


def render_section(section: Section) -> Table:
    """Return one table; names are text, never markup."""
    table = Table(title=Text(section.heading), box=box.SIMPLE_HEAD, title_justify="left", title_style="italic")
    if section.note:
        table.caption, table.caption_justify = Text(section.note), "left"
    for index, name in enumerate(section.header):
        table.add_column(Text(name), justify="left" if index == 0 else "right", overflow="fold")
    for row in section.rows:
        table.add_row(*(Text(cell.text) for cell in row))
    return table
