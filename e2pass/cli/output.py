"""What the commands print."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import typer
from rich.console import Console, RenderableType
from rich.table import Table

from e2pass.backends.fpga.board import list_boards, load_board
from e2pass.report import Comparison, CostReport, save


def write_report(report: CostReport, fmt: str, out: Path | None) -> None:
    """Write a report to ``out``, or print it; ``fmt`` is table, json, csv, md, latex or html."""
    from e2pass.backends.html import to_html

    texts: dict[str, Callable[[], str]] = {
        "json": report.to_json,
        "csv": report.to_csv,
        "md": report.to_markdown,
        "latex": report.to_latex,
        "html": lambda: to_html(report),
        "table": report.table,
    }
    _write(report, texts[fmt], fmt, out)


def write_comparison(comparison: Comparison, fmt: str, out: Path | None) -> None:
    """Write a comparison to ``out``, or print it; ``fmt`` is table, json or md."""
    texts: dict[str, Callable[[], str]] = {
        "json": comparison.to_json,
        "md": comparison.to_markdown,
        "table": comparison.table,
    }
    _write(comparison, texts[fmt], fmt, out)


def _write(shown: RenderableType, text: Callable[[], str], fmt: str, out: Path | None) -> None:
    if out is not None:
        save(text(), out)
    elif fmt == "table":
        console().print(shown)
    else:
        typer.echo(text(), nl=False)


def print_boards() -> None:
    """Print the shipped boards."""
    table = Table("board", "title", "clock")
    for name in list_boards():
        board = load_board(name)
        table.add_row(name, board.title, f"{board.clock_mhz.value:g} MHz")
    console().print(table)


def print_board(name: str) -> None:
    """Print every number of one board."""
    board = load_board(name)
    table = Table("key", "value", "evidence", "source", title=board.title)
    for key, quantity in board.quantities():
        table.add_row(key, f"{quantity.value:g}", quantity.evidence, quantity.source)
    console().print(table)


def console() -> Console:
    """A console as wide as the terminal; 140 columns where there is none."""
    # Without a terminal rich assumes 80 columns and would fold the numbers of a piped table.
    return Console() if sys.stdout.isatty() else Console(width=140)
