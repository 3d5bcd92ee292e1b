"""A report as LaTeX tables for the packages ``booktabs`` and ``graphicx``."""

from __future__ import annotations

from collections.abc import Iterable

from e2pass.report.cost_report import CostReport
from e2pass.report.sections import Section, assumption_lines, coverage_lines, sections, title

_SPECIAL = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}"}
    | {">": r"\textgreater{}", "|": r"\textbar{}", "[": "{[}", "\n": " "}  # after \\ a bracket opens an option
)
_FIT = r"\resizebox{\ifdim\width>\linewidth \linewidth\else \width\fi}{!}{%"  # narrow tables keep their size


def to_latex(report: CostReport) -> str:
    r"""Return the summary as ``table`` environments; the document needs ``\usepackage{booktabs,graphicx}``."""
    about = (title(report), *coverage_lines(report), *assumption_lines(report))
    lines = ["% " + " ".join(line.split()) for line in about]
    for section in sections(report):
        lines += ["", *_table(section, title(report))]
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """Text that LaTeX sets as it is."""
    return text.translate(_SPECIAL)


def _table(section: Section, about: str) -> list[str]:
    note = f"; {section.note}" if section.note else ""
    columns = "".join("l" if section.is_text(i) else "r" for i in range(len(section.header)))
    return [
        r"\begin{table}",
        r"  \centering",
        f"  \\caption{{{escaped(f'{section.heading}. {about}{note}')}}}",
        f"  {_FIT}",
        f"  \\begin{{tabular}}{{{columns}}}",
        r"    \toprule",
        f"    {_row(section.header)}",
        r"    \midrule",
        *(f"    {_row(cell.text for cell in row)}" for row in section.rows),
        r"    \bottomrule",
        r"  \end{tabular}}",
        r"\end{table}",
    ]


def _row(cells: Iterable[str]) -> str:
    return " & ".join(escaped(cell) for cell in cells) + r" \\"
