"""Options that several commands share, and what is checked about them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="package.module:callable or path/to/file.py:callable")]
Arguments = Annotated[
    str | None, typer.Argument(metavar="[JSON]", help="Keyword arguments of the callable, e.g. '{\"depth\": 20}'")
]
Keywords = Annotated[
    str | None, typer.Option("--kwargs", help="The arguments of the callable, as an option", metavar="JSON")
]
Input = Annotated[
    list[str],
    typer.Option("--input", "-i", metavar="[NAME=]DIMS[:DTYPE]", help="Shape, batch first; once for each input"),
]
BoardName = Annotated[str, typer.Option("--board", "-b", help="Name of a shipped board, or path of a board file")]


PRESETS = ("e2train", "paper", "smd", "slu", "psg", "signsgd", "8bit", "neutral", "bit-true")
"""Those of ``e2pass.PRESETS``, which would take torch to import."""
Preset = Annotated[str, typer.Option("--config", help=f"Preset to transform with: {' | '.join(PRESETS)}")]


def keyword_arguments(argument: str | None, option: str | None) -> str | None:
    """Keyword arguments of the model, given after it or as an option."""
    from e2pass.errors import InputError

    if argument is not None and option is not None:
        raise InputError("keyword arguments were given twice, after MODEL and with --kwargs; give them once")
    return option if argument is None else argument


def one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is not allowed, and say which are."""
    from e2pass.errors import InputError

    if value not in allowed:
        raise InputError(f"{option} {value!r} is not allowed; choose one of {', '.join(allowed)}")


def check_output(out: Path | None) -> None:
    """Say before the work, not after it, that its result could not be written."""
    from e2pass.errors import InputError

    if out is not None and not out.resolve().parent.is_dir():
        raise InputError(f"cannot write {out}: there is no folder {out.resolve().parent}")
    if out is not None and out.is_dir():
        raise InputError(f"cannot write {out}: it is a folder")
    if out is not None and not os.access(out.resolve().parent, os.W_OK):
        raise InputError(f"cannot write {out}: the folder {out.resolve().parent} is not writable")
