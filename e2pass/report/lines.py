"""A report as CSV: one line for each operation."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from e2pass.report.cost_report import BASIS, CostReport
from e2pass.step.cost import StepCost
from e2pass.step.variant import Variant


def to_csv(report: CostReport) -> str:
    """Return one line for each operation, priced, free or unpriced, and one for each assumption and ablated step.

    Figures are those of a nominal step; ``status`` says what kind of line it is: ``assumption``, ``priced``, ``free``,
    ``unpriced`` (without figures), ``alone`` (a step with one technique) or ``stage`` (with one more each time).
    """
    levels = _levels(report)
    fixed = ["basis", "status", "step", "name", "op", "region", "layer", "block", "phase", "technique", "probability"]
    figures = ["macs", "alu_ops", "time_s", "energy_j"]
    saved = ["saved_write_bytes", "saved_read_bytes"]
    by_level = [*(f"energy_{k}_j" for k in levels[0]), *(f"{k}_bytes" for k in levels[1])]
    columns = [*fixed, *figures, *by_level, *saved, "note"]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    for key, value in report.assumptions.items():
        writer.writerow({"basis": BASIS, "status": "assumption", "name": key, "note": value})
    for step_name, step in report.steps.items():
        for line in _step_lines(step):
            writer.writerow({"basis": BASIS, "step": step_name, **line})
    for kind, variants in (("alone", report.alone), ("stage", report.stages)):
        writer.writerows({"basis": BASIS, "status": kind, **_variant_line(variant)} for variant in variants)
    return buffer.getvalue()


def _step_lines(step: StepCost) -> Iterator[dict[str, Any]]:
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


def _variant_line(variant: Variant) -> dict[str, Any]:
    return {
        "name": variant.name,
        "technique": "+".join(variant.techniques),
        "macs": variant.totals.macs,
        "time_s": variant.totals.time_s,
        "energy_j": variant.totals.energy_j,
        **{f"energy_{k}_j": v for k, v in variant.by_level.items()},
        **{f"{k}_bytes": v for k, v in variant.traffic_by_level.items()},
    }


def _levels(report: CostReport) -> tuple[list[str], list[str]]:
    """Names of where energy is spent, and of the memory levels, over all steps."""
    energy = dict.fromkeys(k for step in report.steps.values() for k in step.by_level())
    traffic = dict.fromkeys(k for step in report.steps.values() for k in step.traffic_by_level())
    return list(energy), list(traffic)
