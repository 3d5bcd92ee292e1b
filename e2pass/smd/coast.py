"""Coasting: what a dropped step leaves for the optimizer to do."""

from __future__ import annotations

import torch
from torch.optim import LBFGS, Optimizer, SparseAdam


@torch.no_grad()
def coast(optimizer: Optimizer, steps: int = 1) -> None:
    """Let ``optimizer`` make ``steps`` steps as if every gradient were zero: momentum and weight decay still act.

    This is what the published E2-Train code did at a dropped batch: it called ``zero_grad(); step()`` under torch
    1.0, where ``zero_grad`` left zeros instead of None. Every parameter of the optimizer that requires a gradient
    gets zeros for the time of the call; the gradients found are put back afterwards, so a batch in accumulation is
    not disturbed.

    ``LBFGS`` (which needs a loss to evaluate) and ``SparseAdam`` (which only moves the rows that have a gradient) have
    neither momentum nor decay to apply without one; they are left as they are.

    Args:
        optimizer: Any optimizer that can step without a closure.
        steps: Number of dropped steps.
    """
    if steps <= 0 or isinstance(optimizer, (LBFGS, SparseAdam)):
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    found = [p.grad for p in parameters]
    try:
        for _ in range(steps):
            for parameter in parameters:
                # New zeros for each step, because an optimizer may decay or clip the gradient in place.
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
    finally:
        for parameter, grad in zip(parameters, found, strict=True):
            parameter.grad = grad
