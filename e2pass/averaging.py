"""Batch-norm statistics and gates of averaged weights, for transformed models."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from e2pass.capture.state import modes_kept
from e2pass.errors import InputError
from e2pass.runtime.calibration import calibrated
from e2pass.runtime.module import E2Module
from e2pass.runtime.runner import Updates


@torch.no_grad()
def update_bn(loader: Iterable[Any], model: nn.Module, device: torch.device | str | None = None) -> None:
    """Recompute all running statistics by one pass over ``loader``, as ``torch.optim.swa_utils.update_bn`` does.

    That function changes the momentum of the norms, which lowered regions bake in; this one leaves it as it is and
    averages what each batch adds. Running scales of quantizers adapt in the same pass. A block that skips samples
    counts each batch by the share of its samples that it ran on. Of a norm that a model calls several times, later
    calls on a batch weigh more than earlier ones, by one over one minus its momentum. Learned gates get the statistics
    of their logits under these weights, and the price of energy at which they skip the target share; for that the
    logits of the whole pass are held, four bytes for each gate and sample. After an error all are those from before.

    Args:
        loader: Batches: a tensor, or a sequence whose first entry is one.
        model: A transformed model, or ``torch.optim.swa_utils.AveragedModel`` of one.
        device: Where to move the batches to; None leaves them.

    Raises:
        InputError: For a model that is not transformed.
    """
    module = getattr(model, "module", model)
    if not isinstance(module, E2Module):
        raise InputError("update_bn takes a transformed model; for others use torch.optim.swa_utils.update_bn")
    runners = list(module._runners["train"].values())
    users = {name: [r for r in runners if name in r.statistics] for runner in runners for name in runner.statistics}
    totals = {name: _Average() for name in users}
    found = {name: module.get_buffer(name).clone() for name in totals}  # put back unless all batches come through
    gates = contextlib.nullcontext() if module.e2_slu is None else calibrated(module.e2_slu)
    try:
        with gates, modes_kept(module):
            module.train()
            for batch in loader:
                inputs = batch[0] if isinstance(batch, list | tuple) else batch
                for name in totals:
                    module.get_buffer(name).zero_()
                for runner in runners:
                    runner.share = 0.0
                module(inputs.to(device) if device is not None else inputs)
                for name, total in totals.items():
                    total.add(module.get_buffer(name), [(r.statistics[name], r.share) for r in users[name]])
        found = {name: total.mean(otherwise=found[name]) for name, total in totals.items()}
    finally:
        for name, value in found.items():
            module.get_buffer(name).copy_(value)


class _Average:
    """Mean of a statistic over batches, each weighted by the calls and the share of the samples in them."""

    def __init__(self) -> None:
        self.weight = 0.0
        self.total: Tensor | None = None

    def add(self, buffer: Tensor, runs: Iterable[tuple[Updates, float]]) -> None:
        """Take the batch's own value out of a buffer that was zero before it, where it is mixed with that zero."""
        runs = list(runs)
        weight = sum(share * updates.calls for updates, share in runs)
        mixed = 1.0 - math.prod(updates.kept(share) for updates, share in runs)
        if mixed:
            value = buffer * (weight / mixed)
            self.total = value if self.total is None else self.total + value
            self.weight += weight

    def mean(self, otherwise: Tensor) -> Tensor:
        return otherwise if self.total is None else self.total / self.weight
