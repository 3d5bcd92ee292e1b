"""A report as text tables."""

from __future__ import annotations

import io

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
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


def render_section(section: Section) -> RenderableType:
    """Return one table; names are text, never markup."""
    return _Fitting(section)


class _Fitting:
    """A table whose columns stand closer together where it would break words otherwise."""

    def __init__(self, section: Section) -> None:
        self.section = section

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = self._table(gap=1)
        needed = console.measure(wide, options=options.update(max_width=1000)).minimum
        yield wide if needed <= options.max_width else self._table(gap=0)

    def _table(self, gap: int) -> Table:
        section = self.section
        table = Table(
            title=Text(section.heading),
            box=box.SIMPLE_HEAD,
            title_justify="left",
            title_style="italic",
            padding=(0, gap),
            pad_edge=gap > 0,
            show_edge=gap > 0,
        )
        if section.note:
            table.caption, table.caption_justify = Text(section.note), "left"
        for index, name in enumerate(section.header):
            table.add_column(Text(name), justify="left" if index == 0 else "right", overflow="fold")
        for row in section.rows:
            table.add_row(*(Text(cell.text) for cell in row))
        return table
