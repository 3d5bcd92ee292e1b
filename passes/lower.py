"""Lowers every region to its joint forward+backward graph, for the graph, the price and the rewrites."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from e2pass.capture.state import modes_kept
from e2pass.diagnostics import Diagnostics
from e2pass.errors import LoweringError
from e2pass.lowering import lower
from e2pass.passes.base import Pass, PassResult
from e2pass.program import Program


@dataclass(frozen=True)
class Lower(Pass):
    """No options."""

    name: ClassVar[str] = "lower"
    needs: ClassVar[frozenset[str]] = frozenset({"regions"})
    establishes: ClassVar[frozenset[str]] = frozenset({"lowered"})

    def run(self, program: Program) -> PassResult:
        """Write ``program.lowered``: each training region's joint graph twice, one to keep and one to rewrite."""
        diagnostics = Diagnostics()
        batch = program.inputs.batch_size
        root = program.graphs["train"]  # the model's parameters and modules, and the constants that capture lifted
        with modes_kept(program.model):
            program.model.train()
            for region in program.plans["train"].regions:
                try:
                    joint = lower(fx.GraphModule(root, region.graph), region.specs, batch)
                except LoweringError as error:
                    diagnostics.warn(
                        "E2P301", region.name, str(error), "it runs as plain PyTorch and has no price; see the coverage"
                    )
                    continue
                program.lowered[region.name] = (joint, joint.copy())
        return PassResult(program, bool(program.lowered), diagnostics)
