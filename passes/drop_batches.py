"""SMD: the loader drops mini-batches before they are fetched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from e2pass.config import SMD
from e2pass.diagnostics import Diagnostics
from e2pass.passes.base import Pass, PassResult
from e2pass.program import Program
from e2pass.smd import drop_batches


@dataclass(frozen=True)
class DropBatches(Pass):
    """Options are those of ``e2pass.SMD``."""

    p: float = 0.5
    seed: int = 0
    coast: bool = False

    name: ClassVar[str] = "drop-batches"
    establishes: ClassVar[frozenset[str]] = frozenset({"smd"})

    def run(self, program: Program) -> PassResult:
        """Wrap ``program.loader``; without one SMD is left out."""
        diagnostics = Diagnostics()
        if program.loader is None:
            diagnostics.info(
                "E2P500", "", "no loader was given, so SMD is left out of the transformed step and its price",
                "pass the loader to transform, or call e2pass.smd.drop_batches yourself",
            )  # fmt: skip
            return PassResult(program, False, diagnostics)
        program.loader = drop_batches(program.loader, SMD(p=self.p, seed=self.seed, coast=self.coast))
        program.facts.add("drops-batches")
        diagnostics.info("E2P501", "", f"mini-batches are dropped with probability {self.p:g}")
        return PassResult(program, True, diagnostics)
