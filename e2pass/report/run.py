"""A whole run: nominal steps, joules, hours."""

from __future__ import annotations

import math
from dataclasses import dataclass

from e2pass.errors import InputError
from e2pass.step.cost import Totals


@dataclass(frozen=True)
class RunTotals:
    """Cost of a whole run."""

    energy_j: float
    time_s: float
    macs: float
    dram_bytes: float

    @classmethod
    def of(cls, step: Totals, steps: int) -> RunTotals:
        """That of ``steps`` equal steps."""
        return cls(step.energy_j * steps, step.time_s * steps, step.macs * steps, step.dram_bytes * steps)

    @property
    def energy_kj(self) -> float:
        """Kilojoules."""
        return self.energy_j / 1e3

    @property
    def energy_kwh(self) -> float:
        """Kilowatt-hours."""
        return self.energy_j / 3.6e6

    @property
    def hours(self) -> float:
        """Hours."""
        return self.time_s / 3600

    @property
    def average_power_w(self) -> float:
        """Watts, averaged over the run; 0 for an empty one."""
        return self.energy_j / self.time_s if self.time_s else 0.0


@dataclass(frozen=True)
class RunCost:
    """Cost of ``steps`` nominal steps, without and with the transformation. Modelled, not measured."""

    steps: int
    baseline: RunTotals
    transformed: RunTotals | None


def nominal_steps(steps: int | None, epochs: int | None, dataset_size: int | None, batch_size: int | None) -> int:
    """Steps of a run that is given in steps, or in epochs over a data set; a last partial batch counts as a step.

    Raises:
        InputError: If a number is not a positive whole one, or not exactly one of both ways is used.
    """
    given = {"steps": steps, "epochs": epochs, "dataset_size": dataset_size}
    for name, value in given.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise InputError(f"{name} = {value!r} is not allowed: give a whole number of at least 1")
    if steps is not None and epochs is None and dataset_size is None:
        return steps
    if steps is None and epochs is not None and dataset_size is not None:
        if batch_size is None:
            raise InputError("the report does not know its batch size, so give the run in steps")
        return epochs * math.ceil(dataset_size / batch_size)
    raise InputError("give the run either as steps, or as epochs and dataset_size")
