"""Fitting the gates to weights that they were not trained with, such as averaged ones, by one pass over data.

A gate's running statistics are those of its logit under the weights of the last steps, and the price of energy is what
they need to meet the target. Under other weights both are off, and a gate may open for all inputs or for none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from e2pass.runtime.gates import Gate, SLUGates


@contextmanager
def calibrated(slu: SLUGates) -> Iterator[None]:
    """Fit statistics and price to what passes through learned gates within; all else of their state stays.

    Within, gates in training decide as in training, also without gradients: by each batch's own statistics, held to the
    target by the controller. After an error, statistics and price are those from before.
    """
    before = {name: buffer.clone() for name, buffer in slu.named_buffers()}
    slu.logits = [[] for _ in slu.gates]
    slu.steps.zero_()  # the first batches count in full
    fitted: dict[str, Tensor] = {}
    try:
        yield
        if slu.kind == "learned":
            fitted = _fit(slu, [torch.cat(seen) if seen else slu.price.new_zeros(0) for seen in slu.logits])
    finally:
        slu.logits = None
        with torch.no_grad():
            for name, buffer in slu.named_buffers():
                buffer.copy_(fitted.get(name, before[name]))


@torch.no_grad()
def _fit(slu: SLUGates, logits: Sequence[Tensor]) -> dict[str, Tensor]:
    """New values of the buffers; none where a gate saw fewer than two logits, which have no spread."""
    finite = [seen[seen.isfinite()] for seen in logits]
    if any(len(seen) < 2 for seen in finite):
        return {}
    found: dict[str, Tensor] = {}
    prices, shares = [], []
    for i, seen in enumerate(finite):
        gate: Gate = slu.gates[i]  # type: ignore[assignment]
        mean, var = seen.mean(), seen.var()
        found |= {f"gates.{i}.logit_mean": mean, f"gates.{i}.logit_var": var}
        score = (seen - mean) * (var + slu.EPS).rsqrt() + gate.eagerness.clamp(-gate.REACH, gate.REACH)
        prices.append(score / (slu.weight[i] * len(finite)))
        shares.append((slu.weight[i].double() / len(seen)).expand(len(seen)))
    return found | {"price": _price(torch.cat(prices), torch.cat(shares), slu).clamp(-slu.LIMIT, slu.LIMIT)}


def _price(at_which_it_closes: Tensor, share: Tensor, slu: SLUGates) -> Tensor:
    """The price between the last sample that opens within the target and the first one beyond it."""
    prices, order = at_which_it_closes.nan_to_num(0.0).sort(descending=True)  # a block without a share has no price
    executed = share[order].cumsum(0)
    last = int((executed < 1.0 - slu.target - 1e-9).sum())  # a sum of shares is rounded
    return prices[min(last, len(prices) - 1) : last + 2].mean()
