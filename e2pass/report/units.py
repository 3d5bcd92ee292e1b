"""Numbers for people."""

from __future__ import annotations

from collections.abc import Sequence

_PREFIXES: Sequence[tuple[float, str]] = (
    (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""), (1e-3, "m"), (1e-6, "u"), (1e-9, "n"),
    (1e-12, "p"),
)  # fmt: skip


def si(value: float, unit: str) -> str:
    """Format with four significant digits and a prefix of the SI, e.g. ``1.234 mJ``."""
    for factor, prefix in _PREFIXES:
        if abs(value) >= factor:
            return f"{value / factor:.4g} {prefix}{unit}".rstrip()
    return f"{value:.4g} {unit}".rstrip()


def duration(seconds: float) -> str:
    """Format as seconds, minutes, hours or days, whatever reads best."""
    for size, unit_s, name in ((172800.0, 86400.0, "days"), (7200.0, 3600.0, "h"), (120.0, 60.0, "min")):
        if seconds >= size:
            return f"{seconds / unit_s:.4g} {name}"
    return si(seconds, "s")


def percent(share: float | None) -> str:
    """Format a share as a percentage; empty where there is none."""
    return "" if share is None else f"{share:.1%}"
