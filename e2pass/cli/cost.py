"""The commands about cost: ``analyze`` and ``compare``, with the limits that fail a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from e2pass.cli.errors import one_line_errors
from e2pass.cli.options import (
    PRESETS,
    Arguments,
    BoardName,
    Input,
    Keywords,
    Model,
    check_output,
    keyword_arguments,
    one_of,
)

if TYPE_CHECKING:
    from e2pass.report import CostReport

FORMATS = ("table", "json", "csv", "md", "latex", "html")
COMPARED = ("table", "json", "md")
Limit = Annotated[float | None, typer.Option("--max-energy-ratio", help="Exit with code 1 above this ratio", min=0.0)]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="File to write instead of printing")]


def analyze(
    model: Model,
    arguments: Arguments = None,
    *,
    shapes: Input,
    kwargs: Keywords = None,
    board: BoardName = "zedboard",
    objective: Annotated[str, typer.Option(help="What each product is tiled for: energy | latency")] = "energy",
    config: Annotated[
        str | None, typer.Option(help=f"Preset to price beside the plain step: {' | '.join(PRESETS)}")
    ] = None,
    fmt: Annotated[str, typer.Option("--format", "-f", help=" | ".join(FORMATS))] = "table",
    out: Output = None,
    steps: Annotated[int | None, typer.Option(help="Nominal steps of a whole run")] = None,
    epochs: Annotated[int | None, typer.Option(help="Nominal epochs of a whole run, with --dataset-size")] = None,
    dataset_size: Annotated[int | None, typer.Option(help="Samples in an epoch")] = None,
    reuse_predictor: Annotated[
        bool, typer.Option("--reuse-predictor", help="PSG: full weight gradients cost only the bits that remain")
    ] = False,
    dw_skips: Annotated[
        str, typer.Option(help="PSG: what the array skips of predicted weight gradients: element | tensor")
    ] = "element",
    max_energy_ratio: Limit = None,
    fail_on_unpriced: Annotated[
        bool, typer.Option("--fail-on-unpriced", help="Exit with code 1 if an operation has no price")
    ] = False,
) -> None:
    """Model the energy and time of one training step of MODEL on a board.

    --max-energy-ratio is about the transformed step by the plain one and needs --config.
    """
    with one_line_errors():
        from e2pass.api import analyze as analyze_model
        from e2pass.backends.fpga.model import FpgaCostModel
        from e2pass.cli.output import write_report
        from e2pass.cli.target import build_model, parse_inputs
        from e2pass.errors import InputError
        from e2pass.step.rates import PredictorHardware

        one_of("--format", fmt, FORMATS)
        check_output(out)
        if max_energy_ratio is not None and config is None:
            raise InputError("--max-energy-ratio compares with the plain step: say what to transform with, --config")
        hardware = PredictorHardware(reuse_predictor, dw_skips)  # type: ignore[arg-type]
        cost_model = FpgaCostModel(board, objective=objective)  # type: ignore[arg-type]
        inputs = parse_inputs(shapes)
        built = build_model(model, keyword_arguments(arguments, kwargs))
        report = analyze_model(built, inputs, board=cost_model, config=config, hardware=hardware)
        if (steps, epochs, dataset_size) != (None, None, None):
            report = report.with_run(steps, epochs=epochs, dataset_size=dataset_size)
        write_report(report, fmt, out)
    _fail(*_gaps(report, fail_on_unpriced), *_excess(_ratio(report), max_energy_ratio))


def compare(
    a: Annotated[Path, typer.Argument(help="Cost report in JSON")],
    b: Annotated[Path, typer.Argument(help="Another one")],
    step: Annotated[str | None, typer.Option(help="transformed | baseline; by default transformed if both are")] = None,
    fmt: Annotated[str, typer.Option("--format", "-f", help=" | ".join(COMPARED))] = "table",
    out: Output = None,
    max_energy_ratio: Limit = None,
) -> None:
    """Compare two cost reports in JSON: what became of the energy from A to B."""
    with one_line_errors():
        from e2pass.cli.output import write_comparison
        from e2pass.report import compare as compare_reports

        one_of("--format", fmt, COMPARED)
        check_output(out)
        found = compare_reports(a, b, step)  # type: ignore[arg-type]
        write_comparison(found, fmt, out)
    _fail(*_excess(found.energy_ratio, max_energy_ratio))


def _ratio(report: CostReport) -> float | None:
    saved = report.saving.energy
    return None if saved is None else 1.0 - saved


def _gaps(report: CostReport, wanted: bool) -> list[str]:
    unpriced = report.coverage.unpriced
    if not wanted or not unpriced:
        return []
    return [f"{len(unpriced)} operations have no price: {', '.join(sorted({op.op for op in unpriced}))}"]


def _excess(ratio: float | None, limit: float | None) -> list[str]:
    if limit is None or (ratio is not None and ratio <= limit):
        return []
    return [f"the energy ratio {'is unknown' if ratio is None else f'{ratio:.4f}'}, above the limit of {limit:g}"]


def _fail(*reasons: str) -> None:
    for reason in reasons:
        typer.echo(f"e2pass: {reason}", err=True)
    if reasons:
        raise typer.Exit(1)
