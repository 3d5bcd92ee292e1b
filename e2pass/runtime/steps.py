"""The number of the training step: warm-up ends at one, and stochastic rounding draws from it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class StepCounter(nn.Module):
    """Counts forward passes of training; part of the state dict, so a resumed run goes on where it was.

    Attributes:
        count: 0-d int64.
        warmup: Steps that run in full precision.
    """

    count: Tensor

    def __init__(self, warmup: int) -> None:
        super().__init__()
        self.warmup = warmup
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @property
    def warming(self) -> bool:
        """Whether the next step still runs in full precision, and evaluation before it."""
        return self.warmup > 0 and int(self.count) < self.warmup
