"""Batch-norm statistics of averaged weights, for transformed models."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from e2pass.errors import InputError
from e2pass.runtime.module import E2Module


@torch.no_grad()
def update_bn(loader: Iterable[Any], model: nn.Module, device: torch.device | str | None = None) -> None:
    """Recompute all running statistics by one pass over ``loader``, as ``torch.optim.swa_utils.update_bn`` does.

    That function changes the momentum of the norms, which lowered regions bake in; this one leaves it as it is and
    averages what each batch adds. Running scales of quantizers adapt in the same pass. A block that skips samples
    counts each batch by the share of its samples that it ran on.

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
    totals = {name: _Average() for runner in runners for name in runner.statistics}
    held = {name: module.get_buffer(name).clone() for name in totals}
    gates = {k: v.clone() for k, v in module.e2_slu.state_dict().items()} if module.e2_slu is not None else None
    training = module.training
    module.train()
    try:
        for batch in loader:
            inputs = batch[0] if isinstance(batch, list | tuple) else batch
            for name in totals:
                module.get_buffer(name).zero_()
            for runner in runners:
                runner.share = 0.0
            module(inputs.to(device) if device is not None else inputs)
            for runner in runners:
                for name, momentum in runner.statistics.items():
                    totals[name].add(module.get_buffer(name), momentum, runner.share)
    finally:
        for name, total in totals.items():
            module.get_buffer(name).copy_(total.mean(otherwise=held[name]))
        if gates is not None:
            module.e2_slu.load_state_dict(gates)  # type: ignore[union-attr]
        module.train(training)


class _Average:
    """Mean of a statistic over batches, each weighted by the share of its samples."""

    def __init__(self) -> None:
        self.weight = 0.0
        self.total: Tensor | None = None

    def add(self, buffer: Tensor, momentum: float, share: float) -> None:
        """Take the batch's own value out of a buffer that was zero before it; it holds it times both factors."""
        if share:
            value = buffer / momentum
            self.total = value if self.total is None else self.total + value
            self.weight += share

    def mean(self, otherwise: Tensor) -> Tensor:
        return otherwise if self.total is None else self.total / self.weight
