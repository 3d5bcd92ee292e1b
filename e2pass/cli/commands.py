"""The commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from e2pass.cli.errors import one_line_errors

app = typer.Typer(
    name="e2pass",
    help="Rewrite any PyTorch model to train with E2-Train (SMD, SLU, PSG), and model what that saves on an FPGA.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
boards = typer.Typer(help="List, show and check descriptions of boards.", invoke_without_command=True)
app.add_typer(boards, name="boards")

FORMATS = ("table", "json", "csv", "md")
Model = Annotated[str, typer.Argument(help="package.module:callable or path/to/file.py:callable")]
Arguments = Annotated[
    str | None, typer.Argument(metavar="[JSON]", help="Keyword arguments of the callable, e.g. '{\"depth\": 20}'")
]
Keywords = Annotated[str | None, typer.Option("--kwargs", help="The same as an option", metavar="JSON")]
Input = Annotated[
    list[str],
    typer.Option("--input", "-i", metavar="[NAME=]DIMS[:DTYPE]", help="Shape, batch first; once for each input"),
]
BoardName = Annotated[str, typer.Option("--board", "-b", help="Name of a shipped board, or path of a board file")]


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version and leave")] = False) -> None:
    """Hold the options that belong to no command."""
    if version:
        from e2pass import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.command()
def analyze(
    model: Model,
    arguments: Arguments = None,
    *,
    shapes: Input,
    kwargs: Keywords = None,
    board: BoardName = "zedboard",
    config: Annotated[str | None, typer.Option(help="Preset to price beside the plain step, e.g. e2train")] = None,
    fmt: Annotated[str, typer.Option("--format", "-f", help=" | ".join(FORMATS))] = "table",
    out: Annotated[Path | None, typer.Option("--output", "-o", help="File to write instead of printing")] = None,
    fail_on_unpriced: Annotated[
        bool, typer.Option("--fail-on-unpriced", help="Exit with code 1 if an operation has no price")
    ] = False,
) -> None:
    """Model the energy and time of one training step of MODEL on a board."""
    with one_line_errors():
        from e2pass.cli.output import write_report

        _one_of("--format", fmt, FORMATS)
        _check_output(out)
        report = _analyzed(model, arguments, kwargs, shapes, board, config)
        write_report(report, fmt, out)
        unpriced = report.coverage.unpriced
    if fail_on_unpriced and unpriced:
        ops = sorted({op.op for op in unpriced})
        typer.echo(f"e2pass: {len(unpriced)} operations have no price: {', '.join(ops)}", err=True)
        raise typer.Exit(1)


def _analyzed(
    model: str, arguments: str | None, kwargs: str | None, shapes: list[str], board: str, config: str | None
) -> Any:
    from e2pass.api import analyze as analyze_model
    from e2pass.cli.target import build_model, parse_inputs

    inputs = parse_inputs(shapes)
    return analyze_model(build_model(model, _kwargs(arguments, kwargs)), inputs, board=board, config=config)


@app.command()
def inspect(
    model: Model,
    arguments: Arguments = None,
    *,
    shapes: Input,
    kwargs: Keywords = None,
    config: Annotated[str, typer.Option(help="Preset to transform with")] = "e2train",
    board: BoardName = "zedboard",
) -> None:
    """Show the residual blocks of MODEL with their reasons, and everything a transformation would say."""
    with one_line_errors():
        from e2pass.api import transform
        from e2pass.cli.output import print_inspection
        from e2pass.cli.target import build_model, parse_inputs

        inputs = parse_inputs(shapes)
        t = transform(build_model(model, _kwargs(arguments, kwargs)), inputs, config=config, board=board)
        print_inspection(t)


@app.command()
def demo(
    data: Annotated[Path | None, typer.Option(help="CIFAR-10 as .npz with JPEG files, instead of the digits")] = None,
    epochs: Annotated[int | None, typer.Option(help="Nominal epochs of both runs")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas")] = "0,1,2",
    out: Annotated[Path, typer.Option(help="Folder for the JSON report and the graph dump")] = Path("out"),
    limit: Annotated[int | None, typer.Option(help="Use this many images at most", min=1)] = None,
) -> None:
    """Train a small ResNet plainly and transformed, side by side, and say what the transformation saved."""
    with one_line_errors():
        from e2pass.demo.run import run_demo

        run_demo(data=data, epochs=epochs, seeds=_seeds(seeds), out=out, limit=limit)


@boards.callback()
def boards_main(context: typer.Context) -> None:
    """List the boards where no command is given."""
    if context.invoked_subcommand is None:
        boards_list()


@boards.command("list")
def boards_list() -> None:
    """List the boards that ship with e2pass."""
    with one_line_errors():
        from e2pass.cli.output import print_boards

        print_boards()


@boards.command("show")
def boards_show(board: Annotated[str, typer.Argument(help="Name of a shipped board, or path")]) -> None:
    """Show every number of a board, with its unit and source."""
    with one_line_errors():
        from e2pass.cli.output import print_board

        print_board(board)


@boards.command("validate")
def boards_validate(file: Annotated[Path, typer.Argument(help="Board description in YAML")]) -> None:
    """Check a board file; the error names the key, what was found and what is allowed."""
    with one_line_errors():
        from e2pass.backends.fpga.board import load_board

        board = load_board(file)
        typer.echo(f"{file}: valid, board {board.name}")


def _kwargs(argument: str | None, option: str | None) -> str | None:
    from e2pass.errors import InputError

    if argument is not None and option is not None:
        raise InputError("keyword arguments were given twice, after MODEL and with --kwargs; give them once")
    return option if argument is None else argument


def _seeds(text: str) -> tuple[int, ...]:
    from e2pass.errors import InputError

    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--seeds {text!r} is no list of whole numbers, such as 0,1,2") from None
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise InputError(f"--seeds {text!r}: seeds are different whole numbers from 0 up")
    return seeds


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    from e2pass.errors import InputError

    if value not in allowed:
        raise InputError(f"{option} {value!r} is not allowed; choose one of {', '.join(allowed)}")


def _check_output(out: Path | None) -> None:
    """Say before the work, not after it, that its result could not be written."""
    from e2pass.errors import InputError

    if out is not None and not out.resolve().parent.is_dir():
        raise InputError(f"cannot write {out}: there is no folder {out.resolve().parent}")
    if out is not None and out.is_dir():
        raise InputError(f"cannot write {out}: it is a folder")
