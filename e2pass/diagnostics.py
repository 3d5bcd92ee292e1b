"""Diagnostics: what a pass rewrote, what it left alone and why, as values instead of log lines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """How much a diagnostic matters: ``strict=True`` refuses warnings and errors."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True)
class Diagnostic:
    """One remark about one place in the program.

    Attributes:
        code: Stable identifier, ``E2P`` and three digits; the first digit is the stage (1 capture, 2 blocks and
            gates, 3 lowering, 4 quantization and PSG, 5 SMD, 6 pricing).
        severity: ``info``: done as asked. ``warning``: left alone or approximated. ``error``: asked for, not possible.
        node: Name of the graph node, parameter or module it is about; ``""`` for the whole model.
        message: One sentence saying what happened and why.
        hint: What the user can do about it, or ``""``.
    """

    code: str
    severity: Severity
    node: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        where = f" {self.node}:" if self.node else ""
        hint = f" ({self.hint})" if self.hint else ""
        return f"{self.code} {self.severity}{where} {self.message}{hint}"


class Diagnostics(list[Diagnostic]):
    """A list of diagnostics with the filters that a reader needs."""

    def info(self, code: str, node: str, message: str, hint: str = "") -> None:
        """Record something that was done as asked."""
        self.append(Diagnostic(code, Severity.INFO, node, message, hint))

    def warn(self, code: str, node: str, message: str, hint: str = "") -> None:
        """Record something that was left alone."""
        self.append(Diagnostic(code, Severity.WARNING, node, message, hint))

    def with_code(self, *codes: str) -> Iterator[Diagnostic]:
        """Iterate over the diagnostics that carry one of ``codes``."""
        return (d for d in self if d.code in codes)

    def at_least(self, severity: Severity) -> Iterator[Diagnostic]:
        """Iterate over the diagnostics of ``severity`` or worse."""
        order = list(Severity)
        return (d for d in self if order.index(d.severity) >= order.index(severity))

    def __str__(self) -> str:
        return "\n".join(map(str, self))
