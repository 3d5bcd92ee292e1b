"""A report as a JSON document with a schema version, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from e2pass.cost import Phase, Technique
from e2pass.errors import InputError
from e2pass.report.cells import pivot
from e2pass.report.cost_report import BASIS, CostReport
from e2pass.report.rooflines import Ceilings, roofline
from e2pass.report.run import RunCost, RunTotals
from e2pass.step.cost import CostRow, FreeOp, StepCost, Totals, UnpricedOp
from e2pass.step.variant import Variant

SCHEMA = "e2pass/cost-report/2"


def to_json(report: CostReport) -> str:
    """Return everything the report holds."""
    data = {
        "schema": SCHEMA,
        "basis": BASIS,
        "board": report.board,
        "batch_size": report.batch_size,
        "assumptions": dict(report.assumptions),
        "sources": dict(report.sources),
        "saving": asdict(report.saving),
        "coverage": {k: v for k, v in asdict(report.coverage).items() if k != "unpriced"},
        **{name: None for name in ("baseline", "transformed")},
        **{name: _step_to_json(step) for name, step in report.steps.items()},
        "alone": [asdict(variant) for variant in report.alone],
        "stages": [asdict(variant) for variant in report.stages],
        "ceilings": None if report.ceilings is None else asdict(report.ceilings),
        "run": None if report.run is None else asdict(report.run),
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
            board=data["board"],
            baseline=_step_from_json(data["baseline"]),
            transformed=None if after is None else _step_from_json(after),
            alone=tuple(_variant_from_json(variant) for variant in data["alone"]),
            stages=tuple(_variant_from_json(variant) for variant in data["stages"]),
            batch_size=data["batch_size"],
            ceilings=None if data["ceilings"] is None else Ceilings(**data["ceilings"]),
            run=None if data["run"] is None else _run_from_json(data["run"]),
            assumptions=data["assumptions"],
            sources=data["sources"],
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
        "saved_activation_bytes": dict(zip(("written", "read"), step.saved_bytes, strict=True)),
        "by_layer": {k: asdict(v) for k, v in step.by_layer().items()},
        "by_block": {k: asdict(v) for k, v in step.by_block().items()},
        "by_phase_and_technique": [asdict(cell) for cell in pivot(step, "phase", "technique")],
        "roofline": [asdict(point) for point in roofline(step)],
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


def _run_from_json(data: Mapping[str, Any]) -> RunCost:
    after = data["transformed"]
    return RunCost(data["steps"], RunTotals(**data["baseline"]), None if after is None else RunTotals(**after))


def _variant_from_json(data: Mapping[str, Any]) -> Variant:
    sums = ("by_phase", "by_technique", "by_layer", "by_block")
    found = {key: {k: Totals(**v) for k, v in data[key].items()} for key in sums}
    return Variant(**{**data, **found, "totals": Totals(**data["totals"]), "techniques": tuple(data["techniques"])})
