"""Writing a text file whole or not at all."""

from __future__ import annotations

from pathlib import Path

from e2pass.errors import InputError
from e2pass.report.files import save


def write_text(text: str, path: str | Path) -> Path:
    """Write ``text`` to ``path`` by way of a temporary file beside it.

    Raises:
        InputError: If no file can be written there.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of the file to write")
    if not path.parent.is_dir():
        raise InputError(f"the folder {path.parent} does not exist; create it first")
    save(text, path)
    return path
