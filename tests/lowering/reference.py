"""An integer reference of quantized layers and PSG: plain PyTorch on int64 and float64, none of the own operators.

Every sum of products of codes below is exact in float64: codes have at most 16 bits and the layers are tiny.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Function = Callable[[Tensor, Tensor], Tensor]
"""The bilinear map of a layer from activation and weight to output."""

EPS = 2.0**-24


@dataclass(frozen=True)
class Coded:
    """Integer codes and the float64 value of one unit, per tensor or broadcast along the channels."""

    codes: Tensor
    scale: Tensor

    @property
    def value(self) -> Tensor:
        return self.codes.double() * self.scale


def coded(x: Tensor, bits: int, axis: int | None = None, *, power_of_two: bool = False) -> Coded:
    """Round to nearest even in the arithmetic of the definition: the scale and the quotient are float32."""
    limit = 2 ** (bits - 1) - 1
    x = x.detach()
    if axis is None:
        peak = x.abs().max()
    else:
        peak = x.abs().movedim(axis, 0).flatten(1).max(1).values
        peak = peak.reshape([-1 if d == axis else 1 for d in range(x.dim())])
    scale = torch.where(peak == 0, torch.ones_like(peak), peak / limit)
    if power_of_two:
        scale = torch.exp2(torch.ceil(torch.log2(scale.double()))).float()
    quotient = (x / scale).double()
    low = torch.floor(quotient)
    odd = low.long() % 2 == 1
    up = (quotient - low > 0.5) | ((quotient - low == 0.5) & odd)
    codes = (low + up).clamp(-limit, limit).long()
    return Coded(codes, scale.double())


def high_part(of: Coded, bits: int, keep: int, mode: str) -> Coded:
    """The most significant bits of the codes, by exact rational arithmetic."""
    unit = 2 ** (bits - keep)
    quotient = of.codes.double() / unit  # exact: a division by a power of two
    if mode == "floor":
        high = torch.floor(quotient)
    elif mode == "truncate":
        high = torch.trunc(quotient)
    else:
        high = torch.floor(quotient + 0.5) if unit > 1 else quotient
        high = high.clamp(max=2 ** (keep - 1) - 1)
    return Coded(high.long(), of.scale * unit)


def weight_product(f: Function, x: Tensor, gy: Tensor, weight: Tensor) -> Tensor:
    """The layer's weight gradient, in float64."""
    leaf = torch.zeros_like(weight, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(f(x.double(), leaf), leaf, gy.double())
    return gradient


def input_product(f: Function, x: Tensor, w: Tensor, gy: Tensor) -> Tensor:
    """The layer's input gradient, in float64."""
    leaf = torch.zeros_like(x, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(f(leaf, w.double()), leaf, gy.double())
    return gradient


def rounding_bound(magnitude: Tensor, terms: int) -> Tensor:
    """How far a float32 sum of ``terms`` products, absolutely ``magnitude`` in all, can be from the exact one.

    Higham, Accuracy and Stability of Numerical Algorithms, section 3.1; three more roundings for products and scales.
    """
    return (terms + 3) * EPS * magnitude + 1e-30


@dataclass(frozen=True)
class Selection:
    """What PSG makes of one weight gradient, and where float32 may see it otherwise."""

    update: Tensor
    sign: Tensor
    confident: Tensor
    clear: Tensor


def select(
    predicted: Tensor, full: Tensor, bounds: tuple[Tensor, Tensor], beta: float, tau: float | None, sparsify: bool
) -> Selection:
    """Threshold and selection on exact values; ``bounds`` are those of the two sums."""
    threshold = beta * predicted.abs().max() if tau is None else torch.tensor(tau, dtype=torch.float64)
    confident = predicted.abs() >= threshold
    below = torch.zeros_like(full) if sparsify else full
    chosen = torch.where(confident, predicted, below)
    slack = bounds[0] + beta * bounds[0].max()
    clear = (predicted.abs() - threshold).abs() > slack
    if tau is None and beta == 0:
        clear = torch.ones_like(confident)
    clear &= (chosen == 0) | (chosen.abs() > torch.where(confident, *bounds))
    return Selection(chosen, chosen.sign(), confident, clear)
