"""The commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from e2pass.cli.cost import analyze, compare
from e2pass.cli.errors import one_line_errors
from e2pass.cli.export import export
from e2pass.cli.inspection import inspect
from e2pass.cli.opt import opt
from e2pass.cli.options import check_output

app = typer.Typer(
    name="e2pass",
    help="Rewrite any PyTorch model to train with E2-Train (SMD, SLU, PSG), and model what that saves on an FPGA.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
boards = typer.Typer(help="List, show and check descriptions of boards.", invoke_without_command=True)
app.add_typer(boards, name="boards")


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version and leave")] = False) -> None:
    """Hold the options that belong to no command."""
    if version:
        from e2pass import __version__

        typer.echo(__version__)
        raise typer.Exit


app.command()(analyze)
app.command()(compare)
app.command()(inspect)
app.command()(opt)
app.command()(export)


@app.command()
def demo(
    data: Annotated[Path | None, typer.Option(help="CIFAR-10 as .npz with JPEG files, instead of the digits")] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Nominal epochs of both runs; by default 20, or 10 with --data")
    ] = None,
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


@boards.command("import-zigzag")
def boards_import_zigzag(
    file: Annotated[Path, typer.Argument(help="ZigZag accelerator in YAML")],
    clock_mhz: Annotated[float, typer.Option("--clock-mhz", help="Clock in MHz, which ZigZag does not state")],
    out: Annotated[Path | None, typer.Option("--output", "-o", help="File to write instead of printing")] = None,
) -> None:
    """Turn a ZigZag accelerator into a board description; what that simplifies is said on stderr."""
    with one_line_errors():
        from e2pass.backends.fpga.zigzag import import_zigzag
        from e2pass.report.files import save

        check_output(out)
        imported = import_zigzag(file, clock_mhz)
        for note in imported.notes:
            typer.echo(f"note: {note}", err=True)
        if out is None:
            typer.echo(imported.text, nl=False)
        else:
            save(imported.text, out)
            typer.echo(f"wrote {out}, board {imported.board.name}")


def _seeds(text: str) -> tuple[int, ...]:
    from e2pass.errors import InputError

    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--seeds {text!r} is no list of whole numbers, such as 0,1,2") from None
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise InputError(f"--seeds {text!r}: seeds are different whole numbers from 0 up")
    return seeds
