"""What the command line does with errors: one line on stderr and exit code 2, never a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from e2pass.errors import E2PassError

EXIT_BAD_INPUT = 2


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn an error that the user can act on into one line on stderr; interruptions end quietly with code 130."""
    try:
        yield
    except (E2PassError, OSError) as error:
        typer.echo(f"e2pass: {_one_line(error)}", err=True)
        raise typer.Exit(EXIT_BAD_INPUT) from None
    except KeyboardInterrupt:
        typer.echo("e2pass: interrupted", err=True)
        raise typer.Exit(130) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
