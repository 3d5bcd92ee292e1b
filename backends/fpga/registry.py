"""Which formula prices which operator: priced, declared free with a reason, or unsupported. The three are disjoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from e2pass.backends.fpga.workload import Work
from e2pass.cost import Free, OpSite, Unsupported
from e2pass.errors import ConfigError

WorkFormula = Callable[[OpSite], Work | Free | Unsupported]
_Formula = TypeVar("_Formula", bound=WorkFormula)

_ENTRIES: dict[str, WorkFormula | Free] = {}


def register_cost(*ops: str) -> Callable[[_Formula], _Formula]:
    """Register a formula for operators.

    Args:
        *ops: Names as they stand in graphs, with overload (``aten.mean.dim``) or without (``aten.mean``, for all
            overloads that have no formula of their own).

    Returns:
        A decorator for a function from ``OpSite`` to ``Work`` (or ``Free`` or ``Unsupported``, where that depends on
        the arguments).

    Raises:
        ConfigError: If one of the names has a formula or is declared free already.

    >>> from e2pass.backends.fpga import Work, register_cost
    >>> @register_cost("mylib.scale")
    ... def scale(site):
    ...     return Work("in + out", read_bytes=site.inputs[0].bytes, write_bytes=site.outputs[0].bytes)
    >>> unregister("mylib.scale")
    """

    def add(formula: _Formula) -> _Formula:
        for op in ops:
            _insert(op, formula)
        return formula

    return add


def declare_free(reason: str, *ops: str) -> None:
    """Declare that operators move no bytes and compute nothing on the board, and why.

    Raises:
        ConfigError: If one of the names has a formula or is declared free already.
    """
    for op in ops:
        _insert(op, Free(reason))


def unregister(op: str) -> None:
    """Remove what is registered under exactly this name, so that another formula can take its place."""
    if _ENTRIES.pop(op, None) is None:
        raise ConfigError(f"nothing is registered for {op!r}")


def lookup(op: str) -> WorkFormula | Free | None:
    """Return what is registered for ``op``: under its full name, its name without overload, or its functional twin."""
    packet = op.rpartition(".")[0]
    for name in (op, packet, packet.removesuffix("_")):
        if name in _ENTRIES:
            return _ENTRIES[name]
    return None


def registered() -> Iterator[tuple[str, WorkFormula | Free]]:
    """Iterate over all entries."""
    return iter(sorted(_ENTRIES.items(), key=lambda entry: entry[0]))


def _insert(op: str, entry: WorkFormula | Free) -> None:
    if op in _ENTRIES:
        kind = "declared free" if isinstance(_ENTRIES[op], Free) else "priced by a formula"
        raise ConfigError(f"operator {op!r} is {kind} already; call unregister({op!r}) first to replace that")
    _ENTRIES[op] = entry
