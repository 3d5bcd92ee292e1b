"""Stochastic mini-batch dropping (SMD, E2-Train section 3.1): a loader that leaves batches out."""

from e2pass.smd.coast import coast
from e2pass.smd.loader import SMDLoader, drop_batches
from e2pass.smd.schedule import DropSchedule

__all__ = ["DropSchedule", "SMDLoader", "coast", "drop_batches"]
