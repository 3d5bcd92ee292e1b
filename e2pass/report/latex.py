"""A report as LaTeX tables for the ``booktabs`` package."""

from __future__ import annotations

from collections.abc import Iterable

from e2pass.report.cost_report import CostReport
from e2pass.report.sections import Section, assumption_lines, coverage_lines, sections, title

_SPECIAL = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}"}
    | {">": r"\textgreater{}", "|": r"\textbar{}", "\n": " "}
)


def to_latex(report: CostReport) -> str:
    r"""Return the summary as ``table`` environments; the document needs ``\usepackage{booktabs}``."""
    lines = [f"% {line}" for line in (title(report), *coverage_lines(report), *assumption_lines(report))]
    for section in sections(report):
        lines += ["", *_table(section, title(report))]
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """Text that LaTeX sets as it is."""
    return text.translate(_SPECIAL)


def _table(section: Section, about: str) -> list[str]:
    note = f"; {section.note}" if section.note else ""
    return [
        r"\begin{table}",
        r"  \centering",
        f"  \\caption{{{escaped(f'{section.heading}. {about}{note}')}}}",
        f"  \\begin{{tabular}}{{l{'r' * (len(section.header) - 1)}}}",
        r"    \toprule",
        f"    {_row(section.header)}",
        r"    \midrule",
        *(f"    {_row(cell.text for cell in row)}" for row in section.rows),
        r"    \bottomrule",
        r"  \end{tabular}",
        r"\end{table}",
    ]


def _row(cells: Iterable[str]) -> str:
    return " & ".join(escaped(cell) for cell in cells) + r" \\"
