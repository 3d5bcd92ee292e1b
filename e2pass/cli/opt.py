"""``e2pass opt``: runs a pipeline given as text, and prints what each pass makes of the program."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from e2pass.cli.errors import one_line_errors
from e2pass.cli.options import Arguments, BoardName, Input, Keywords, Model, keyword_arguments

if TYPE_CHECKING:
    from e2pass.passes.base import Pass, PassResult
    from e2pass.program import Program


def opt(
    model: Model,
    arguments: Arguments = None,
    *,
    shapes: Input,
    passes: Annotated[
        str,
        typer.Option(
            "--passes",
            "-p",
            help='Names, separated by commas, with options: "find-residual-blocks, insert-gates{hidden=10}"',
        ),
    ],
    kwargs: Keywords = None,
    board: BoardName = "zedboard",
    print_after_each: Annotated[
        bool, typer.Option("--print-after-each", help="Print the program after each pass, not only after the last")
    ] = False,
    timed: Annotated[bool, typer.Option("--time", help="Print how long each pass took")] = False,
) -> None:
    """Run any pipeline of passes on MODEL and print the program: its graphs, one line a node."""
    with one_line_errors():
        from e2pass.api import run_passes
        from e2pass.cli.output import console
        from e2pass.cli.target import build_model, parse_inputs

        inputs = parse_inputs(shapes)
        seconds: list[tuple[str, float, bool]] = []

        def after(item: Pass, result: PassResult, took: float) -> None:
            seconds.append((item.spec(), took, result.modified))
            if print_after_each:
                typer.echo(f"// after {item.spec()}{'' if result.modified else ': not modified'}")
                for diagnostic in result.diagnostics:
                    typer.echo(f"// {diagnostic}")
                if result.modified:
                    typer.echo("\n".join(program_dump(result.program)))

        built = build_model(model, keyword_arguments(arguments, kwargs))
        program = run_passes(built, inputs, passes, board=board, on_pass=after)
        if not print_after_each:
            typer.echo("\n".join(program_dump(program)))
        if timed:
            console().print(_times(seconds))


def program_dump(program: Program) -> Iterator[str]:
    """The graphs of a program, in the form they have: flat, cut into regions, or lowered."""
    from e2pass.dump import dump

    if program.lowered:
        for name, (_, joint) in program.lowered.items():
            yield f"region {name}, forward and backward\n{dump(joint.graph)}\n"
    elif program.plans:
        for region in program.plans["train"].regions:
            yield f"region {region.name}\n{dump(region.graph)}\n"
    else:
        for mode, gm in program.unique_graphs():
            yield f"{mode} graph\n{dump(gm.graph)}\n"


def _times(seconds: list[tuple[str, float, bool]]) -> object:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="time of each pass, measured here")
    for heading in ("pass", "time", "modified"):
        table.add_column(heading, justify="right" if heading == "time" else "left")
    for spec, took, modified in seconds:
        table.add_row(escape(spec), f"{1e3 * took:.1f} ms", "yes" if modified else "no")
    table.add_row("all", f"{1e3 * sum(took for _, took, _ in seconds):.1f} ms", "", style="bold")
    return table
