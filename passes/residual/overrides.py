"""Blocks that the user adds or removes by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

from e2pass.errors import ConfigError


def resolve(
    wanted: Iterable[str],
    keys: Mapping[str, Sequence[int]],
    refused: Mapping[str, str],
    option: str,
) -> set[int]:
    """Return the blocks that the names stand for.

    Args:
        wanted: Names that the user gave: of blocks, of addition nodes, or module paths.
        keys: For every name the blocks it stands for.
        refused: For additions that cannot be skipped at all, the reason.
        option: Which option the names come from, for the message.

    Raises:
        ConfigError: If a name is unknown (the message lists close matches), or stands for something that cannot be
            skipped.
    """
    found: set[int] = set()
    for name in wanted:
        if name in keys:
            found.update(keys[name])
        elif name in refused:
            raise ConfigError(f"{option}: {name!r} cannot be skipped: {refused[name]}")
        else:
            close = difflib.get_close_matches(name, [*keys, *refused], n=4, cutoff=0.5)
            known = f"close matches are {', '.join(map(repr, close))}" if close else _some(keys)
            raise ConfigError(f"{option}: there is no residual block or addition named {name!r}; {known}")
    return found


def _some(keys: Mapping[str, Sequence[int]]) -> str:
    if not keys:
        return "the model has none"
    shown = ", ".join(map(repr, list(keys)[:4]))
    return f"known names are {shown}" + (", ..." if len(keys) > 4 else "")
