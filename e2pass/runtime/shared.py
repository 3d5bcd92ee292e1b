"""Weights used in several regions: sum the gradients first, then select and sign once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from e2pass.config import PSG
from e2pass.runtime import ops


class SumThenSign(torch.autograd.Function):
    """Identity with two outputs: regions send the full gradient back through one, the predicted one through the other.

    Autograd sums each over all regions before ``backward`` sees it, so the sign is of the sum.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, name: str, psg: PSG, on_counts: Callable[[str, Tensor], None]
    ) -> tuple[Tensor, Tensor]:
        """Two aliases of ``weight``."""
        ctx.name, ctx.psg, ctx.on_counts = name, psg, on_counts
        return weight.view_as(weight), weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, full: Tensor, predicted: Tensor) -> Any:
        """Select, sign and scale the summed gradients."""
        chosen, counts = ops.select(predicted, full, ops.threshold(predicted, ctx.psg.beta))
        update = torch.sign(chosen)
        if ctx.psg.scale == "mean":
            update = update * predicted.abs().mean()
        ctx.on_counts(ctx.name, counts)
        return update, None, None, None
