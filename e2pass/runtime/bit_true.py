"""Norms and sums whose result does not depend on the order in which a kernel adds, as ``torch.library`` ops.

A sum in double precision that is rounded to single at the end differs between two orders only where it lies within
1e-16 of the middle between two floats. What follows is written as single operations of IEEE arithmetic, none of them
contracted, so that another kernel or runtime finds the same bits. Where all elements are codes of a quantizer with a
power of two as its scale, products are exact as well (``Bits(bit_true=True)``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from e2pass.runtime.ops import define

Moments = Callable[[Tensor, Sequence[int]], tuple[Tensor, Tensor]]


def moments_in_place(x: Tensor, dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over ``dims``, which stay, in double precision.

    The double copy is overwritten: fresh memory of its size takes more time than the arithmetic.
    """
    wide = x.to(torch.float64, copy=True)
    mean = wide.mean(list(dims), keepdim=True)
    return mean, wide.sub_(mean).square_().mean(list(dims), keepdim=True)


def moments(x: Tensor, dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The same without an operation in place, for an export."""
    wide = x.double()
    mean = wide.mean(list(dims), keepdim=True)
    centred = wide - mean
    return mean, (centred * centred).mean(list(dims), keepdim=True)


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    moments: Moments = moments_in_place,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Normalise the channels of ``x`` (N, C, ...), as ``aten::_native_batch_norm_legit_functional``.

    Returns:
        The result; mean and reciprocal deviation (C,), as backward wants them; and the running statistics that follow.
    """
    view = [1, -1, *[1] * (x.dim() - 2)]
    if training:
        mean, var = (moment.reshape(-1) for moment in moments(x, [0, *range(2, x.dim())]))
    else:
        assert running_mean is not None
        assert running_var is not None
        mean, var = running_mean.double(), running_var.double()
    low_mean, invstd = mean.to(x.dtype), _reciprocal_deviation(var, eps, x.dtype)
    factor = invstd if weight is None else invstd * weight
    offset = low_mean * factor
    offset = -offset if bias is None else bias - offset
    out = _laid_out(x * factor.view(view) + offset.view(view), x)
    if running_mean is None or running_var is None:
        return out, low_mean, invstd, low_mean.clone(), var.to(x.dtype)
    if not training:
        return out, low_mean, invstd, running_mean.clone(), running_var.clone()
    count = x.shape[0]
    for size in x.shape[2:]:
        count = count * size
    unbiased = (var * count / (count - 1)).to(running_var.dtype)  # whole numbers, which every runtime holds exactly
    moved_mean = momentum * low_mean.to(running_mean.dtype) + (1 - momentum) * running_mean
    return out, low_mean, invstd, moved_mean, momentum * unbiased + (1 - momentum) * running_var


def layer_norm(
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    moments: Moments = moments_in_place,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise over the last dimensions, as ``aten::native_layer_norm``: result, mean, reciprocal deviation."""
    mean, var = moments(x, list(range(x.dim() - len(shape), x.dim())))
    low_mean, invstd = mean.to(x.dtype), _reciprocal_deviation(var, eps, x.dtype)
    out = (x - low_mean) * invstd
    out = out if weight is None else out * weight
    out = out if bias is None else out + bias
    return out.contiguous(), low_mean, invstd


def group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    samples: int,
    channels: int,
    positions: int,
    groups: int,
    eps: float,
    moments: Moments = moments_in_place,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise groups of channels of each sample, as ``aten::native_group_norm``: result, mean, reciprocal deviation.

    ``samples``, ``channels`` and ``positions`` are the sizes of ``x`` (N, C, ...), its last ones multiplied.
    """
    mean, var = moments(x.reshape(samples, groups, -1), [2])
    low_mean, invstd = mean.to(x.dtype), _reciprocal_deviation(var, eps, x.dtype)
    out = (x.reshape(samples, groups, -1) - low_mean) * invstd
    out = out.reshape(x.shape)
    view = [1, channels, *[1] * (x.dim() - 2)]
    out = out if weight is None else out * weight.view(view)
    out = out if bias is None else out + bias.view(view)
    return _laid_out(out, x), low_mean.squeeze(-1), invstd.squeeze(-1)


def mean(x: Tensor, dims: Sequence[int], keepdim: bool = False) -> Tensor:
    """The mean over ``dims``, in the dtype of ``x``."""
    return x.double().mean(list(dims), keepdim).to(x.dtype)


def total(x: Tensor, dims: Sequence[int], keepdim: bool = False) -> Tensor:
    """The sum over ``dims``, in the dtype of ``x``."""
    return x.double().sum(list(dims), keepdim).to(x.dtype)


def _laid_out(out: Tensor, x: Tensor) -> Tensor:
    """In the layout that ATen's own norm returns: what backward was traced with, and its kernels read memory so."""
    return out.contiguous(memory_format=suggest_memory_format(x))


def _reciprocal_deviation(var: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return (1 / torch.sqrt(var + eps)).to(dtype)


define(
    "batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, bool training, "
    "float momentum, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    batch_norm,
    batch_norm,
    fusible=False,
)
define(
    "layer_norm(Tensor x, SymInt[] shape, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
    layer_norm,
    layer_norm,
    fusible=False,
)
define(
    "group_norm(Tensor x, Tensor? weight, Tensor? bias, SymInt samples, SymInt channels, SymInt positions, int groups, "
    "float eps) -> (Tensor, Tensor, Tensor)",
    group_norm,
    group_norm,
    fusible=False,
)
define("mean(Tensor x, int[] dims, bool keepdim=False) -> Tensor", mean, mean, fusible=False)
define("sum(Tensor x, int[] dims, bool keepdim=False) -> Tensor", total, total, fusible=False)

DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.e2pass.batch_norm.default: functools.partial(batch_norm, moments=moments),
    torch.ops.e2pass.layer_norm.default: functools.partial(layer_norm, moments=moments),
    torch.ops.e2pass.group_norm.default: functools.partial(group_norm, moments=moments),
    torch.ops.e2pass.mean.default: mean,
    torch.ops.e2pass.sum.default: total,
}
"""The operators as single operations of PyTorch, none in place, for an export."""
