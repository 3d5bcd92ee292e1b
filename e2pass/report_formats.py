"""How a cost report is written: text tables, JSON, CSV and Markdown. Each says that it is modelled, not measured."""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from e2pass.cost import Phase, Technique
from e2pass.errors import InputError
from e2pass.report import BASIS, CostReport, CostRow, FreeOp, StepCost, Totals, UnpricedOp
from e2pass.variant import Variant

SCHEMA = "e2pass/cost-report/2"
SHOWN_UNPRICED = 12


def save(text: str, path: str | os.PathLike[str] | None) -> str:
    """Write ``text`` to ``path`` (if given) in one step, so that no half-written file is ever seen; return it."""
    if path is None:
        return text
    target = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise InputError(f"report cannot be written to {target}: {error.strerror}") from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(target)
    except OSError as error:
        raise InputError(f"report cannot be written to {target}: {error.strerror}") from None
    finally:
        Path(temporary).unlink(missing_ok=True)
    return text


def to_text(report: CostReport, width: int) -> str:
    """Return the tables as plain text."""
    buffer = io.StringIO()
    Console(file=buffer, width=width, color_system=None).print(render(report))
    return buffer.getvalue()


def render(report: CostReport) -> Group:
    """Return the tables for a rich console."""
    parts: list[RenderableType] = [Text(_title(report), style="bold")]
    for heading, header, rows in _summary(report):
        table = Table(title=heading, box=box.SIMPLE_HEAD, title_justify="left", title_style="italic")
        for index, name in enumerate(header):
            table.add_column(name, justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*row)
        parts.append(table)
    parts.extend(Text(line) for line in (*_coverage_lines(report), *_assumption_lines(report)))
    return Group(*parts)


def to_markdown(report: CostReport) -> str:
    """Return the summary as Markdown."""
    lines = [f"# {_title(report)}", ""]
    for heading, header, rows in _summary(report):
        lines += [f"## {heading}", "", _md_row(header), _md_row(["---"] + ["---:"] * (len(header) - 1))]
        lines += [_md_row(row) for row in rows]
        lines.append("")
    lines += ["## Coverage", "", *(f"- {_md_escape(line)}" for line in _coverage_lines(report)), ""]
    lines += ["## Assumptions", "", *(f"- {_md_escape(line)}" for line in _assumption_lines(report)), ""]
    return "\n".join(lines)


def to_csv(report: CostReport) -> str:
    """Return one line for each operation, priced, free or unpriced, and one for each assumption.

    Figures are those of a nominal step; ``status`` says what kind of line it is. Unpriced lines have no figures.
    """
    levels = _levels(report)
    fixed = ["basis", "status", "step", "name", "op", "region", "layer", "block", "phase", "technique", "probability"]
    figures = ["macs", "alu_ops", "time_s", "energy_j"]
    columns = [*fixed, *figures, *(f"energy_{k}_j" for k in levels[0]), *(f"{k}_bytes" for k in levels[1]), "note"]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    for key, value in report.assumptions.items():
        writer.writerow({"basis": BASIS, "status": "assumption", "name": key, "note": value})
    for step_name, step in report.steps.items():
        for line in _csv_lines(step):
            writer.writerow({"basis": BASIS, "step": step_name, **line})
    return buffer.getvalue()


def to_json(report: CostReport) -> str:
    """Return everything the report holds."""
    data = {
        "schema": SCHEMA,
        "basis": BASIS,
        "board": report.board,
        "assumptions": dict(report.assumptions),
        "sources": dict(report.sources),
        "saving": asdict(report.saving),
        "coverage": {k: v for k, v in asdict(report.coverage).items() if k != "unpriced"},
        **{name: None for name in ("baseline", "transformed")},
        **{name: _step_to_json(step) for name, step in report.steps.items()},
        "alone": [asdict(variant) for variant in report.alone],
        "stages": [asdict(variant) for variant in report.stages],
    }
    return json.dumps(data, indent=1, allow_nan=False, default=str) + "\n"


def from_json(text: str) -> CostReport:
    """Read back what :func:`to_json` wrote.

    Raises:
        InputError: If it is no report of this schema version.
    """
    try:
        data = json.loads(text)
        found = data.get("schema")
    except (json.JSONDecodeError, AttributeError) as error:
        raise InputError(f"this is no cost report in JSON: {error}") from None
    if found != SCHEMA:
        raise InputError(f"cost report of schema {found!r} cannot be read; this version reads {SCHEMA!r}")
    try:
        after = data["transformed"]
        return CostReport(
            data["board"],
            _step_from_json(data["baseline"]),
            None if after is None else _step_from_json(after),
            tuple(_variant_from_json(variant) for variant in data["alone"]),
            tuple(_variant_from_json(variant) for variant in data["stages"]),
            data["assumptions"],
            data["sources"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"cost report in JSON is damaged: {type(error).__name__}: {error}") from None


def _step_to_json(step: StepCost) -> dict[str, Any]:
    return {
        "totals": asdict(step.totals),
        "by_phase": {k: asdict(v) for k, v in step.by_phase().items()},
        "by_technique": {k: asdict(v) for k, v in step.by_technique().items()},
        "energy_j_by_level": step.by_level(),
        "bytes_by_level": step.traffic_by_level(),
        "dram": step.dram,
        "rows": [asdict(row) for row in step.rows],
        "free": [asdict(op) for op in step.free],
        "unpriced": [asdict(op) for op in step.unpriced],
    }


def _step_from_json(data: Mapping[str, Any]) -> StepCost:
    rows = [
        CostRow(**{**row, "phase": Phase(row["phase"]), "technique": Technique(row["technique"])})
        for row in data["rows"]
    ]
    return StepCost(
        tuple(rows),
        tuple(FreeOp(**op) for op in data["free"]),
        tuple(UnpricedOp(**op) for op in data["unpriced"]),
        data["dram"],
    )


def _variant_from_json(data: Mapping[str, Any]) -> Variant:
    sums = ("by_phase", "by_technique", "by_layer", "by_block")
    found = {key: {k: Totals(**v) for k, v in data[key].items()} for key in sums}
    return Variant(**{**data, **found, "totals": Totals(**data["totals"]), "techniques": tuple(data["techniques"])})


def _csv_lines(step: StepCost) -> Iterator[dict[str, Any]]:
    for row in step.rows:
        line = asdict(row)
        energy, traffic = line.pop("energy_j"), line.pop("traffic_bytes")
        line["note"] = line.pop("formula")
        line["energy_j"] = row.total_j
        line |= {f"energy_{k}_j": v for k, v in energy.items()} | {f"{k}_bytes": v for k, v in traffic.items()}
        yield {"status": "priced", **line}
    for op in step.free:
        yield {"status": "free", "name": op.name, "op": op.op, "note": op.reason}
    for missing in step.unpriced:
        yield {
            "status": "unpriced",
            "name": missing.name,
            "op": missing.op,
            "probability": missing.probability,
            "note": missing.reason,
        }


def _levels(report: CostReport) -> tuple[list[str], list[str]]:
    """Names of where energy is spent, and of the memory levels, over all steps."""
    energy = dict.fromkeys(k for step in report.steps.values() for k in step.by_level())
    traffic = dict.fromkeys(k for step in report.steps.values() for k in step.traffic_by_level())
    return list(energy), list(traffic)


Section = tuple[str, list[str], list[list[str]]]


def _title(report: CostReport) -> str:
    return f"Training cost on {report.board}, one nominal step ({BASIS})"


def _summary(report: CostReport) -> Iterator[Section]:
    """Yield heading, column names and lines of each table."""
    yield _total_section(report)
    yield _breakdown(report, "By phase", {n: s.by_phase() for n, s in report.steps.items()})
    yield _breakdown(report, "By technique", {n: s.by_technique() for n, s in report.steps.items()})
    yield _level_section(report)


def _total_section(report: CostReport) -> Section:
    header = ["", *report.steps]
    figures: list[tuple[str, Callable[[Totals], str], float | None]] = [
        ("energy", lambda t: si(t.energy_j, "J"), report.saving.energy),
        ("time", lambda t: si(t.time_s, "s"), report.saving.time),
        ("MACs", lambda t: si(t.macs, ""), report.saving.macs),
        (f"{report.baseline.dram} traffic", lambda t: si(t.dram_bytes, "B"), report.saving.dram),
    ]
    rows = [[name, *(show(step.totals) for step in report.steps.values())] for name, show, _ in figures]
    if report.transformed is not None:
        header.append("saving")
        for row, (_, _, saved) in zip(rows, figures, strict=True):
            row.append("" if saved is None else f"{saved:.1%}")
    return "Totals", header, rows


def _breakdown(report: CostReport, heading: str, by_step: Mapping[str, Mapping[str, Totals]]) -> Section:
    header = [heading.removeprefix("By ")]
    for name in by_step:
        header += [f"{name} energy", "share", "time", "MACs"]
    rows = []
    for key in dict.fromkeys(key for found in by_step.values() for key in found):
        row = [key]
        for name, found in by_step.items():
            totals, whole = found.get(key, Totals()), report.steps[name].energy_j
            share = f"{totals.energy_j / whole:.1%}" if whole else ""
            row += [si(totals.energy_j, "J"), share, si(totals.time_s, "s"), si(totals.macs, "")]
        rows.append(row)
    return heading, header, rows


def _level_section(report: CostReport) -> Section:
    header = ["where"]
    for name in report.steps:
        header += [f"{name} energy", "share", "bytes"]
    rows = []
    for key in _levels(report)[0]:
        row = [key]
        for step in report.steps.values():
            joules, moved = step.by_level().get(key, 0.0), step.traffic_by_level().get(key)
            share = f"{joules / step.energy_j:.1%}" if step.energy_j else ""
            row += [si(joules, "J"), share, "" if moved is None else si(moved, "B")]
        rows.append(row)
    return "By place", header, rows


def _coverage_lines(report: CostReport) -> list[str]:
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


def _assumption_lines(report: CostReport) -> list[str]:
    return [f"{key}: {value}" for key, value in report.assumptions.items()]


def si(value: float, unit: str) -> str:
    """Format with four significant digits and a prefix of the SI, e.g. ``1.234 mJ``."""
    prefixes: Sequence[tuple[float, str]] = (
        (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""), (1e-3, "m"), (1e-6, "u"), (1e-9, "n"),
    )  # fmt: skip
    for factor, prefix in prefixes:
        if abs(value) >= factor:
            return f"{value / factor:.4g} {prefix}{unit}".rstrip()
    return f"{value:.4g} {unit}".rstrip()


def _md_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(_md_escape(cell) for cell in cells) + " |"


def _md_escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _umask() -> int:
    """The permissions that new files lack; temporary ones are created private."""
    current = os.umask(0)
    os.umask(current)
    return current
