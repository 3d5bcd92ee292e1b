"""Interpolation, adaptive pooling and replicated borders, forward or backward, in terms of operators that ONNX has.

Each is a product with one matrix for each dimension, and its backward is the product with the transposed ones. The
matrices are made in the graph, where they are constant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table

aten = torch.ops.aten
Sizes = Sequence[int]


def _along(x: Tensor, dim: int, matrix: Tensor) -> Tensor:
    """The product of a matrix with every line of ``x`` along a dimension."""
    return (x.movedim(dim, -1) @ matrix.transpose(0, 1)).movedim(-1, dim)


def _adaptive_windows(size: int, number: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """First position of each window, and the one behind its last."""
    cell = torch.arange(number, device=like.device)
    return cell * size // number, ((cell + 1) * size + number - 1) // number


def _adaptive_matrix(size: int, number: int, like: Tensor) -> Tensor:
    """Averages over ``number`` windows that cover ``size`` elements, (number, size)."""
    start, end = _adaptive_windows(size, number, like)
    position = torch.arange(size, device=like.device)
    inside = (position >= start.unsqueeze(1)) & (position < end.unsqueeze(1))
    return inside.to(like.dtype) / (end - start).to(like.dtype).unsqueeze(1)


def adaptive_average(x: Tensor, output_size: Sizes) -> Tensor:
    """``aten::_adaptive_avg_pool2d`` and ``3d``."""
    n = len(output_size)
    for dim, number in zip(range(-n, 0), output_size, strict=True):
        x = _along(x, dim, _adaptive_matrix(x.shape[dim], number, x))
    return x


def _adaptive_average_backward(n: int) -> Callable[..., Tensor]:
    def backward(grad: Tensor, x: Tensor) -> Tensor:
        for dim in range(-n, 0):
            grad = _along(grad, dim, _adaptive_matrix(x.shape[dim], grad.shape[dim], grad).transpose(0, 1))
        return grad

    return backward


def adaptive_max(x: Tensor, output_size: Sizes) -> tuple[Tensor, Tensor]:
    """``aten::adaptive_max_pool2d`` and ``3d``: all windows side by side, as wide as the widest."""
    n, sizes = len(output_size), x.shape[-len(output_size) :]
    values, place = x, torch.zeros([], dtype=torch.int64, device=x.device)
    for i, (size, number) in enumerate(zip(sizes, output_size, strict=True)):
        start, end = _adaptive_windows(size, number, x)
        widest = max(-(-(k + 1) * size // number) - k * size // number for k in range(number))
        # A window that is narrower than the widest one repeats its last element.
        position = torch.minimum(start.unsqueeze(1) + torch.arange(widest, device=x.device), end.unsqueeze(1) - 1)
        dim = x.dim() - n + 2 * i  # each dimension before this one is two by now
        values = aten.index_select(values, dim, position.flatten()).unflatten(dim, (number, widest))
        place = (place * size).unsqueeze(-1).unsqueeze(-1) + position
    order = [2 * i + j for j in range(2) for i in range(n)]  # all windows before all of their elements
    windows = values.permute(*range(x.dim() - n), *(x.dim() - n + i for i in order)).flatten(-n)
    places = place.permute(order).flatten(-n)
    best = windows.argmax(-1, keepdim=True)
    found = places.expand(windows.shape).gather(-1, best)
    return windows.gather(-1, best).squeeze(-1), found.squeeze(-1)


def replication_pad_backward(grad: Tensor, x: Tensor, padding: Sizes) -> Tensor:
    """Add the gradients of the border to those of the elements that it repeats."""
    for i, left in enumerate(padding[::2]):  # of the last dimension first
        size, number = x.shape[-1 - i], grad.shape[-1 - i]
        source = (torch.arange(number, device=x.device) - left).clamp(0, size - 1)
        repeats = (source.unsqueeze(0) == torch.arange(size, device=x.device).unsqueeze(1)).to(grad.dtype)
        grad = _along(grad, -1 - i, repeats)
    return grad


def _interpolation_backward(
    n: int, interpolate: Callable[..., Tensor], *, plane: bool, corners: bool
) -> Callable[..., Tensor]:
    """The gradient of an interpolation in ``n`` dimensions.

    Args:
        n: Dimensions.
        interpolate: The operator that interpolates in one dimension, or in a plane.
        plane: Whether it does in a plane.
        corners: Whether it has the option ``align_corners``.
    """

    def backward(grad: Tensor, output_size: Sizes, input_size: Sizes, *rest: Any) -> Tensor:
        options, scales = (rest[:1], rest[1:]) if corners else ((), rest)
        scales = (*scales, *[None] * (n - len(scales)))
        for dim, scale in zip(range(-n, 0), scales, strict=True):
            size, number = input_size[dim], output_size[dim]
            eye = torch.eye(size, dtype=grad.dtype, device=grad.device).unsqueeze(1)
            if plane:  # of width 2: PyTorch takes a plane of width 1 for one with its channels last, and errs
                made = interpolate(eye.unsqueeze(-1).repeat(1, 1, 1, 2), [number, 2], *options, scale, None)[..., 0]
            else:
                made = interpolate(eye, [number], *options, scale)
            grad = _along(grad, dim, made.flatten(1))
        return grad

    return backward


def _scaled(operator: Any) -> Callable[..., Tensor]:
    """Linear or cubic interpolation by a scale that is not the ratio of the sizes, which its translation would take."""
    by_indices: Callable[..., Tensor] = decomposition_table[operator]

    def forward(x: Tensor, output_size: Sizes, align_corners: bool, *scales: float | None) -> Any:
        sizes = zip(scales, x.shape[-len(output_size) :], output_size, strict=False)
        if all(scale is None or size * scale == number for scale, size, number in sizes):
            return NotImplemented
        return by_indices(x, output_size, align_corners, *scales)

    return forward


def _interpolations() -> dict[Any, Callable[..., Any]]:
    """By torch's decompositions forward: the exporter's translations do not heed all of the scales."""
    made = {}
    linear, cubic = (decomposition_table[o.default] for o in (aten.upsample_linear1d, aten.upsample_bicubic2d))
    for n in (1, 2, 3):
        for kind in ("upsample_nearest", "_upsample_nearest_exact"):
            line = decomposition_table[getattr(aten, f"{kind}1d").default]
            made[f"{kind}{n}d"] = _interpolation_backward(n, line, plane=False, corners=False)
    for n, name in enumerate(("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d"), 1):
        made[name] = _interpolation_backward(n, linear, plane=False, corners=True)
    made["upsample_bicubic2d"] = _interpolation_backward(2, cubic, plane=True, corners=True)
    for name in ("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"):
        made[name] = _interpolation_backward(2, getattr(aten, name), plane=True, corners=True)
    backward = {getattr(aten, f"{name}_backward").default: function for name, function in made.items()}
    names = ("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d")
    operators = [getattr(aten, name).default for name in names]
    return backward | {operator: _scaled(operator) for operator in operators}


TABLE: dict[Any, Callable[..., Any]] = {
    aten._adaptive_avg_pool2d.default: adaptive_average,
    aten._adaptive_avg_pool3d.default: adaptive_average,
    aten._adaptive_avg_pool2d_backward.default: _adaptive_average_backward(2),
    aten._adaptive_avg_pool3d_backward.default: _adaptive_average_backward(3),
    aten.adaptive_max_pool2d.default: adaptive_max,
    aten.adaptive_max_pool3d.default: adaptive_max,
    aten.replication_pad1d_backward.default: replication_pad_backward,
    aten.replication_pad2d_backward.default: replication_pad_backward,
    aten.replication_pad3d_backward.default: replication_pad_backward,
    **_interpolations(),
}
"""Operators to their decompositions."""
