"""Merging a block's body back into its shortcut: masked as the reference, gathered for real skipping."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def per_sample(mask: Tensor, like: Tensor) -> Tensor:
    """View a (B,) mask so that it broadcasts over ``like`` of shape (B, ...)."""
    return mask.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def merge_masked(
    shortcut: Tensor, body: Tensor | Sequence[Tensor], gate: tuple[Tensor, ...], scale: float = 1.0
) -> Tensor:
    """``shortcut + mask * body``: every sample's body is computed, closed ones are multiplied by zero.

    A body of several arms is added arm by arm, as the model does it.
    """
    mask = gate[0] * scale if scale != 1.0 else gate[0]
    for arm in [body] if isinstance(body, Tensor) else body:
        shortcut = shortcut + per_sample(mask, arm) * arm
    return shortcut


def merge_gathered(
    shortcut: Tensor, body: Tensor | None, mask: Tensor, index: Tensor | None, untouched: Sequence[Tensor] = ()
) -> Tensor:
    """Add the body's results for the open samples to the shortcut.

    Args:
        shortcut: (B, ...).
        body: (n, ...) results of the open samples; None if no sample is open.
        mask: (B,) decisions in {0, 1}; its gradient for an open sample is the inner product of the sample's body
            with the gradient of the sum, for a closed one zero: its body is not known.
        index: (n,) positions of the open samples; None if all are open.
        untouched: Parameters of a body that did not run which get a gradient of zeros, not none.
    """
    if body is None:
        return _Closed.apply(shortcut, mask, *untouched)  # type: ignore[no-untyped-call, no-any-return]
    if not mask.requires_grad:
        return shortcut + body if index is None else shortcut.index_add(0, index, body)
    return _Gathered.apply(shortcut, body, mask, index)  # type: ignore[no-untyped-call, no-any-return]


def inner_products(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each sample of two (n, ...) tensors, in the order in which both lie in memory: (n,)."""
    if a.dim() == 4 and all(t.is_contiguous(memory_format=torch.channels_last) for t in (a, b)):
        a, b = a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)
    result: Tensor = torch.linalg.vecdot(a.flatten(1), b.flatten(1))
    return result


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shortcut: Tensor, body: Tensor, mask: Tensor, index: Tensor | None) -> Tensor:
        ctx.save_for_backward(body, index)
        ctx.samples, ctx.dtype = mask.shape, mask.dtype
        return shortcut + body if index is None else shortcut.index_add(0, index, body)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        body, index = ctx.saved_tensors
        open_grad = grad if index is None else grad.index_select(0, index)
        inner = inner_products(open_grad, body).to(ctx.dtype)
        mask_grad = inner if index is None else inner.new_zeros(ctx.samples).index_copy(0, index, inner)
        return grad, open_grad, mask_grad, None


class _Closed(torch.autograd.Function):
    """A copy of the shortcut, so that an in-place consumer cannot reach the fork; all other gradients are zero."""

    @staticmethod
    def forward(ctx: Any, shortcut: Tensor, mask: Tensor, *untouched: Tensor) -> Tensor:
        ctx.zeros = [(t.shape, t.dtype) for t in (mask, *untouched)]
        return shortcut.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        wanted = zip(ctx.zeros, ctx.needs_input_grad[1:], strict=True)
        return grad, *(grad.new_zeros(shape, dtype=dtype) if wants else None for (shape, dtype), wants in wanted)
