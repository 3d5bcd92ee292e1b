"""Loop nests: convolutions and matrix products, forward and backward, as one iteration space with three tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

from e2pass.cost import TensorSpec

Name = Literal["x", "w", "y"]
OPERANDS: dict[Name, tuple[Name, Name]] = {"y": ("x", "w"), "x": ("y", "w"), "w": ("x", "y")}
"""The two tensors that are read, by the one that is written."""


@dataclass(frozen=True)
class Window:
    """One spatial dimension of a convolution: output positions, kernel taps, and how they meet the input.

    Attributes:
        out: Output positions (loop OY or OX).
        kernel: Kernel taps (loop FY or FX).
        stride: Input positions between neighbouring output positions.
        dilation: Input positions between neighbouring taps.
        padding: Input positions that are added on each side and hold zeros.
        size: Input positions.
    """

    out: int
    kernel: int = 1
    stride: int = 1
    dilation: int = 1
    padding: int = 0
    size: int = 1

    @property
    def pointwise(self) -> bool:
        """Whether each output position meets one input position of its own, so that it is like a batch."""
        return self.kernel == 1 and self.stride == 1 and self.out == self.size

    def reach(self, tile: int, taps: int) -> int:
        """Most input positions that ``tile`` neighbouring outputs and ``taps`` taps meet."""
        span = (tile - 1) * self.stride + (taps - 1) * self.dilation + 1
        return min(self.size, span, tile * taps)

    def moved(self, tile: int, taps: int) -> int:
        """Input positions fetched when outputs and taps are cut into tiles: overlaps count each time.

        Positions that no output meets are not fetched.
        """
        return _moved(self, tile, taps)

    @property
    def touched(self) -> int:
        """Input positions that any output meets."""
        return _moved(self, self.out, self.kernel)


@lru_cache(maxsize=65536)
def _moved(window: Window, tile: int, taps: int) -> int:
    outs = range(window.out)
    reaches = [range(f, min(f + taps, window.kernel)) for f in range(0, window.kernel, taps)]
    # Without gaps between neighbours the positions of a tile are an interval, which need not be listed.
    dense = window.dilation == 1 and window.stride <= min(len(reach) for reach in reaches)
    return sum(_met(window, outs[o : o + tile], reach, dense) for reach in reaches for o in range(0, window.out, tile))


def _met(window: Window, outs: range, taps: range, dense: bool) -> int:
    low, high = (
        o * window.stride + f * window.dilation - window.padding for o, f in ((outs[0], taps[0]), (outs[-1], taps[-1]))
    )
    if dense:
        return max(0, min(high, window.size - 1) - max(low, 0) + 1)
    met = {o * window.stride + f * window.dilation - window.padding for o in outs for f in taps}
    return sum(0 <= position < window.size for position in met)


@dataclass(frozen=True)
class Nest:
    """The loops B, K, C, OY, OX, FY, FX and G of a convolution, and which of its three tensors they write.

    ``y[b,g,k,o] += x[b,g,c,o*stride + f*dilation - padding] * w[g,k,c,f]``. The input gradient runs over the same
    loops and writes ``x``, the weight gradient writes ``w``; a matrix product has no windows. Loop K is irrelevant for
    ``x``, B and the output positions for ``w``, C and the taps for ``y``; G is relevant for all three.

    Attributes:
        b: Batch, and every other dimension that behaves like one.
        k: Output channels of a group.
        c: Input channels of a group.
        windows: Spatial dimensions, none that is pointwise.
        g: Groups, or independent products.
        writes: The tensor that is written.
        x_bits: Width of an element of ``x`` in off-chip memory; of ``w`` and ``y`` likewise.
        w_bits: See ``x_bits``.
        y_bits: See ``x_bits``.
    """

    b: int
    k: int
    c: int
    windows: tuple[Window, ...] = ()
    g: int = 1
    writes: Name = "y"
    x_bits: int = 32
    w_bits: int = 32
    y_bits: int = 32

    @cached_property
    def positions(self) -> int:
        """Output positions."""
        return math.prod(v.out for v in self.windows)

    @cached_property
    def taps(self) -> int:
        """Kernel taps."""
        return math.prod(v.kernel for v in self.windows)

    @cached_property
    def macs(self) -> float:
        """Multiply-accumulates: the product of all loops."""
        return float(self.b * self.k * self.c * self.g * self.positions * self.taps)

    def elements(self, name: Name) -> int:
        """Elements of one of the tensors."""
        if name == "x":
            return self.b * self.c * self.g * math.prod(v.size for v in self.windows)
        return self.g * self.k * (self.c * self.taps if name == "w" else self.b * self.positions)

    def touched(self, name: Name) -> int:
        """Elements of one of the tensors that some MAC uses; strides may leave elements of ``x`` out."""
        if name == "x":
            return self.b * self.c * self.g * math.prod(v.touched for v in self.windows)
        return self.elements(name)

    def bits(self, name: Name) -> int:
        """Width of an element of one of the tensors in off-chip memory."""
        return {"x": self.x_bits, "w": self.w_bits, "y": self.y_bits}[name]

    @cached_property
    def reads(self) -> tuple[Name, Name]:
        """The tensors that are read."""
        return OPERANDS[self.writes]

    @cached_property
    def compulsory_bytes(self) -> float:
        """Each element that is used once, and the whole result: no mapping moves less."""
        read = sum(self.touched(name) * self.bits(name) / 8 for name in self.reads)
        return read + self.elements(self.writes) * self.bits(self.writes) / 8

    @cached_property
    def parallel(self) -> tuple[int, int]:
        """Sizes of the two output dimensions that an output-stationary array spreads over its axes.

        The first is the one that the first operand read has and the second lacks: positions for outputs and input
        gradients, there those that any output meets; weight positions of an output channel for weight gradients.
        """
        if self.writes == "y":
            return self.b * self.positions, self.k
        if self.writes == "x":
            met = math.prod(v.touched for v in self.windows)
            return self.b * max(met, 1), self.c  # none where every output lies in the padding
        return self.c * self.taps, self.k


def convolution(
    x: TensorSpec, w: TensorSpec, y: TensorSpec, *, stride: tuple[int, ...], padding: tuple[int, ...],
    dilation: tuple[int, ...], groups: int, writes: Name,
) -> Nest:  # fmt: skip
    """Return the nest of a convolution from ``x`` (N, C, ...) to ``y`` (N, K, ...), or of one of its gradients.

    A transposed convolution is the nest that writes ``x``, with its input as ``y``.
    """
    count = len(x.shape) - 2
    geometry = (_each(values, count) for values in (stride, padding, dilation))
    windows, batch = [], x.shape[0]
    for out, taps, size, step, pad, spread in zip(y.shape[2:], w.shape[2:], x.shape[2:], *geometry, strict=True):
        window = Window(out, taps, step, spread, pad, size)
        if window.pointwise:
            batch *= out
        else:
            windows.append(window)
    return Nest(
        batch, w.shape[0] // groups, w.shape[1], tuple(windows), groups, writes, x.bits, w.bits, y.bits
    )  # fmt: skip


def product(m: int, k: int, n: int, bits: tuple[int, int, int], batches: int = 1) -> Nest:
    """Return the nest of ``batches`` products of an m x k by a k x n matrix; ``bits`` of operands and result."""
    return Nest(m, n, k, (), batches, "y", *bits)


def _each(values: tuple[int, ...], count: int) -> tuple[int, ...]:
    """One number stands for all dimensions."""
    return tuple(values) if len(values) == count else tuple(values) * count
