"""Pricing: an analysis that runs twice, on the baseline for the gates' energy weights, and on the result."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch

from e2pass.diagnostics import Diagnostics
from e2pass.passes.base import Pass, PassResult
from e2pass.program import Program
from e2pass.step.training_step import TrainingStep, block_energy


@dataclass(frozen=True)
class WeighGates(Pass):
    """Weights each gate by the priced energy of its block.

    Attributes:
        step: Holds the cost model.
    """

    step: TrainingStep = dataclasses.field(compare=False)

    name: ClassVar[str] = "weigh-gates"
    needs: ClassVar[frozenset[str]] = frozenset({"lowered"})

    def run(self, program: Program) -> PassResult:
        """Write ``program.slu.weight``: each block's share of the gated blocks' energy."""
        if program.slu is None:
            return PassResult(program, False)
        energies = block_energy(program, self.step.cost_model)
        total = sum(energies.values())
        diagnostics = Diagnostics()
        if total <= 0 or min(energies.values()) <= 0:
            diagnostics.warn("E2P600", "", "some gated block has no price, so all gates weigh the same")
            return PassResult(program, False, diagnostics)
        program.slu.weight.copy_(torch.tensor([energies[i] / total for i in range(len(energies))]))
        return PassResult(program, True)


@dataclass(frozen=True)
class Price(Pass):
    """Builds the training step's operations for graph and report.

    Attributes:
        step: Cost model, loss and optimizer.
    """

    step: TrainingStep = dataclasses.field(compare=False)

    name: ClassVar[str] = "price"
    needs: ClassVar[frozenset[str]] = frozenset({"lowered"})
    establishes: ClassVar[frozenset[str]] = frozenset({"priced"})

    def run(self, program: Program) -> PassResult:
        """Write ``program.step``; an analysis, no graph changes."""
        diagnostics = Diagnostics()
        self.step.build(program, diagnostics)
        return PassResult(program, False, diagnostics)
