"""The hard decision of a gate, with the gradient that trains it, and decisions without one that others wait for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def processes_wait() -> bool:
    """Whether other processes may wait for a gradient of every parameter, also of those that were not used."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class WithZeroGradients(torch.autograd.Function):
    """The decision as it is; gates that did not decide get gradients of zeros."""

    @staticmethod
    def forward(ctx: Any, decision: Tensor, *unused: Tensor) -> Tensor:
        """Return a copy of ``decision``."""
        ctx.save_for_backward(*unused)
        return decision.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Zeros for every parameter."""
        return None, *(torch.zeros_like(p) for p in ctx.saved_tensors)


class HardDecision(torch.autograd.Function):
    """Step function forward; backward the sigmoid's slope times the task gradient, plus the compute term.

    Takes standardised logits (n, 1) and the gate's offset; returns decisions (n,) and scores (n,). The compute term is
    relative to the task gradient at this gate, so that loss scaling and accumulation change nothing; it also reaches
    samples whose block did not run and so have no task gradient.
    """

    @staticmethod
    def forward(ctx: Any, logit: Tensor, offset: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """Open where the score is above zero; a score that is no number closes."""
        score = logit.squeeze(1) + offset
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(score, alpha)
        return (score > 0).to(score.dtype), score

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_score: Tensor | None) -> Any:
        """Gradients of the logits and the offset."""
        score, alpha = ctx.saved_tensors
        if grad is not None:
            p = torch.sigmoid(score)
            through = (grad + alpha * grad.abs().mean()) * p * (1 - p)
            grad_score = through if grad_score is None else grad_score + through
        return (None, None, None) if grad_score is None else (grad_score.unsqueeze(1), grad_score.sum(), None)
