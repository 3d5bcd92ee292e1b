"""Writing a text in one step, so that no half-written file is ever seen."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from e2pass.errors import InputError


def save(text: str, path: str | os.PathLike[str] | None) -> str:
    """Write ``text`` to ``path`` (if given) in one step, so that no half-written file is ever seen; return it."""
    if path is None:
        return text
    target = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise InputError(f"{target} cannot be written: {error.strerror}") from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(target)
    except OSError as error:
        raise InputError(f"{target} cannot be written: {error.strerror}") from None
    finally:
        Path(temporary).unlink(missing_ok=True)
    return text


def _umask() -> int:
    """The permissions that new files lack; temporary ones are created private."""
    current = os.umask(0)
    os.umask(current)
    return current
