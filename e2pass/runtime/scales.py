"""Running scales of the activation quantizers, frozen in evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from e2pass.runtime.own_types import OwnTypes


class RunningScales(OwnTypes):
    """One buffer a region with the exponential moving average of its quantizers' scales; 0 means not seen yet.

    Attributes:
        names: For each region the quantizers in the order of its buffer.
    """

    MOMENTUM = 0.1
    """As batch norm's: evaluation then sees scales about as old as the statistics it normalises with."""

    def __init__(self, names: dict[str, Sequence[str]]) -> None:
        super().__init__()
        self.names = {region: tuple(quantizers) for region, quantizers in names.items()}
        for region, quantizers in self.names.items():
            self.register_buffer(region, torch.zeros(len(quantizers)))

    def get(self, region: str, name: str) -> Tensor:
        """The 0-d running scale of one quantizer; 0 for one that training never had."""
        quantizers = self.names.get(region, ())
        if name not in quantizers:
            return torch.zeros(())
        buffer: Tensor = self._buffers[region]  # type: ignore[assignment]
        return buffer[quantizers.index(name)]

    def update(self, region: str, names: Sequence[str], scales: Sequence[Tensor]) -> None:
        """Average in the scales of one execution; the first one counts in full, one that is no number not at all."""
        buffer: Tensor = self._buffers[region]  # type: ignore[assignment]
        index = torch.tensor([self.names[region].index(name) for name in names], device=buffer.device)
        fresh, held = torch.stack([s.detach().to(buffer.dtype) for s in scales]), buffer[index]
        moved = torch.where(held == 0, fresh, held.lerp(fresh, self.MOMENTUM))
        # A batch with a NaN spoils its own step; kept in an average it would spoil every evaluation after it.
        buffer[index] = torch.where(fresh.isfinite(), moved, held)
