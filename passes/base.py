"""The pass protocol: a pass reads and writes one ``Program``, says what it needs and what holds afterwards."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

from e2pass.diagnostics import Diagnostics
from e2pass.errors import PassError
from e2pass.program import Program


@dataclass(frozen=True)
class PassResult:
    """What a pass did.

    Attributes:
        program: The program after the pass; passes work in place, so it is the one they were given.
        modified: Whether anything but diagnostics changed.
        diagnostics: What was rewritten, and what was left alone and why.
    """

    program: Program
    modified: bool
    diagnostics: Diagnostics = field(default_factory=Diagnostics)


@dataclass(frozen=True)
class Pass(ABC):
    """Base of all passes: frozen dataclasses whose fields are their options.

    Attributes:
        name: Kebab-case imperative, the key in the registry.
        needs: Facts that must hold before (see ``Program.facts``).
        establishes: Facts that hold afterwards.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset({"captured"})
    establishes: ClassVar[frozenset[str]] = frozenset()

    def requires(self, program: Program) -> None:
        """Raise ``PassError`` where the program is not ready for this pass."""
        missing = self.needs - program.facts
        if missing:
            raise PassError(f"{self.name} needs {', '.join(sorted(missing))}; run the passes that establish it first")

    @abstractmethod
    def run(self, program: Program) -> PassResult:
        """Do the work in place."""

    def ensures(self, program: Program) -> None:
        """Raise ``PassError`` where the pass broke its own promise."""
        missing = self.establishes - program.facts
        if missing:
            raise PassError(f"{self.name} promised {', '.join(sorted(missing))} and did not deliver")

    def spec(self) -> str:
        """The pass and its options as text, e.g. ``insert-gates{skip=0.4}``; ``registry.parse`` reads it back."""
        options = ",".join(f"{k}={_plain(v)}" for k, v in self.options().items())
        return f"{self.name}{{{options}}}" if options else self.name

    def options(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        given = {}
        for option in dataclasses.fields(self):
            value = getattr(self, option.name)
            if option.compare and value != option.default:
                given[option.name.replace("_", "-")] = value
        return given


def _plain(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)
