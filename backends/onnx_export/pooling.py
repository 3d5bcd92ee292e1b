"""Pooling over windows of one size, forward and backward, in terms of operators that ONNX has.

Why the forward of an average too: the exporter's translation leaves out ``divisor_override``, and ONNX places the
windows of ``ceil_mode`` differently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
Sizes = Sequence[int]


def _max_backward(n: int) -> Callable[..., Tensor]:
    def backward(grad: Tensor, x: Tensor, *rest: Any) -> Tensor:
        """Add each gradient at the position in its plane, or volume, that the maximum came from."""
        indices: Tensor = rest[-1]
        planes = torch.zeros_like(x).flatten(-n)
        return planes.scatter_add(-1, indices.flatten(-n), grad.flatten(-n)).view(x.shape)

    return backward


class _Windows:
    """The windows of an average pooling, as ``aten`` places and counts them."""

    def __init__(
        self,
        x: Tensor,
        n: int,
        kernel: Sizes,
        stride: Sizes,
        padding: Sizes,
        ceil_mode: bool,
        count_include_pad: bool,
        divisor: int | None,
    ) -> None:
        self.n = n
        self.kernel, self.stride, self.padding = ([*v] * (n // len(v)) for v in (kernel, stride or kernel, padding))
        self.size = [int(s) for s in x.shape[-n:]]
        self.number = [self._number(i, ceil_mode) for i in range(n)]
        self.include, self.divisor = count_include_pad, divisor
        self.like = x

    def _number(self, i: int, ceil_mode: bool) -> int:
        size, kernel, stride, pad = self.size[i], self.kernel[i], self.stride[i], self.padding[i]
        number = (size + 2 * pad - kernel + (stride - 1 if ceil_mode else 0)) // stride + 1
        if ceil_mode and (number - 1) * stride >= size + pad:  # a window must start in the input or left of it
            number -= 1
        return number

    def padding_to(self, sign: int) -> list[int]:
        """Padding, or with -1 cropping, between the input and all that the windows cover; last dimension first."""
        pads: list[int] = []
        for i in reversed(range(self.n)):
            covered = (self.number[i] - 1) * self.stride[i] + self.kernel[i]
            pads += [sign * self.padding[i], sign * (covered - self.padding[i] - self.size[i])]
        return pads

    def divide(self, sums: Tensor) -> Tensor:
        """By the number of elements that count in each window."""
        if self.divisor is not None:
            return sums / self.divisor
        for i in range(self.n):
            sums = sums / self._counts(i).view(-1, *[1] * (self.n - 1 - i))
        return sums

    def _counts(self, i: int) -> Tensor:
        start = torch.arange(self.number[i], device=self.like.device) * self.stride[i] - self.padding[i]
        end = (start + self.kernel[i]).clamp(max=self.size[i] + self.padding[i])
        if not self.include:
            start, end = start.clamp(min=0), end.clamp(max=self.size[i])
        return (end - start).to(self.like.dtype)


def _average(n: int, pool: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(
        x: Tensor,
        kernel_size: Sizes,
        stride: Sizes = (),
        padding: Sizes = (0,),
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Any:
        """The sum over each window of the padded input, divided by what counts in it."""
        windows = _Windows(x, n, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
        pads = windows.padding_to(1)
        if not any(pads) and divisor_override is None:
            return NotImplemented
        sums: Tensor = pool(aten.constant_pad_nd(x, pads), windows.kernel, windows.stride)
        for size in windows.kernel:
            sums = sums * size
        return windows.divide(sums)

    return forward


def _average_backward(n: int) -> Callable[..., Tensor]:
    def backward(
        grad: Tensor,
        x: Tensor,
        kernel_size: Sizes,
        stride: Sizes,
        padding: Sizes,
        ceil_mode: bool,
        count_include_pad: bool,
        divisor_override: int | None,
    ) -> Tensor:
        """The transposed convolution with a kernel of ones, one group a channel."""
        windows = _Windows(x, n, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
        channels = x.shape[-n - 1]
        ones = grad.new_ones((channels, 1, *windows.kernel))
        shares = windows.divide(grad)
        whole = aten.convolution(shares, ones, None, windows.stride, [0] * n, [1] * n, True, [0] * n, channels)
        result: Tensor = aten.constant_pad_nd(whole, windows.padding_to(-1))
        return result

    return backward


TABLE: dict[Any, Callable[..., Any]] = {
    aten.max_pool2d_with_indices_backward.default: _max_backward(2),
    aten.max_pool3d_with_indices_backward.default: _max_backward(3),
    aten.adaptive_max_pool2d_backward.default: _max_backward(2),
    aten.adaptive_max_pool3d_backward.default: _max_backward(3),
    aten.avg_pool2d.default: _average(2, aten.avg_pool2d),
    aten.avg_pool3d.default: _average(3, aten.avg_pool3d),
    aten.avg_pool2d_backward.default: _average_backward(2),
    aten.avg_pool3d_backward.default: _average_backward(3),
}
"""Operators to their decompositions."""
