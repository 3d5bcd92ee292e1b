"""The command line: ``e2pass demo | analyze | compare | inspect | opt | export | boards``.

Only typer and rich are imported here; every command imports what it needs, so that ``e2pass --help`` answers at once.
"""

from __future__ import annotations

from e2pass.cli.commands import app

__all__ = ["app"]
