"""Weights used in several regions: sum the gradients first, then select and sign once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from e2pass.config import PSG
from e2pass.runtime import ops  # registers torch.ops.e2pass

e2 = torch.ops.e2pass


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
        psg: PSG = ctx.psg
        tau = e2.threshold(predicted, psg.beta) if psg.tau is None else e2.fixed_threshold(predicted, psg.tau)
        if psg.stats:
            ctx.on_counts(ctx.name, ops.agreement(predicted, full, tau))
        chosen = e2.sparsify(predicted, tau) if psg.sparsify else e2.select(predicted, full, tau)
        return _signed(chosen, predicted, psg), None, None, None


def _signed(chosen: Tensor, predicted: Tensor, psg: PSG) -> Tensor:
    if not psg.sign:
        return chosen
    update: Tensor = e2.sign(chosen)
    return update * predicted.abs().mean() if psg.scale == "mean" else update
