"""Products without a loop nest of their own (fused attention): which operand stays on the chip, by closed form."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

from e2pass.backends.fpga.mapper import ArrayShape, Mapped
from e2pass.backends.fpga.tilings import Level
from e2pass.backends.fpga.workload import Product


class Traffic(NamedTuple):
    """Off-chip bytes of a product by operand, and what was kept on the chip."""

    a: float
    b: float
    out: float
    kept: str

    @property
    def total_bytes(self) -> float:
        """Bytes of all three."""
        return self.a + self.b + self.out


def map_fused(product: Product, levels: tuple[Level, ...], array: ArrayShape) -> Mapped:
    """Map a product memory by memory; the array is taken to be used in full.

    Each operand of the array is shared along one of its axes, the result is written once.
    """
    traffic = {level.name: dict.fromkeys(("a", "b", "out"), 0.0) for level in levels}
    for outer, level in pairwise(levels[::-1]):
        crossing = map_product(product, level.size_bytes, array.accumulator_bits)
        for name, amount in (("a", crossing.a), ("b", crossing.b), ("out", crossing.out)):
            traffic[outer.name][name] += amount
            traffic[level.name][name] += amount
    inner = traffic[levels[0].name]
    inner["a"] += product.macs * product.a.bits / 8 / array.columns
    inner["b"] += product.macs * product.b.bits / 8 / array.rows
    inner["out"] += product.out.bytes
    return Mapped(traffic, 1.0, crossing.kept)


def map_product(product: Product, buffer_bytes: float, accumulator_bits: int) -> Traffic:
    r"""Choose the operand to keep on the chip so that the off-chip traffic is least.

    Half of the on-chip memory holds tiles of the kept tensors, the other half streams the rest; ``S`` is that half.
    With ``a``, ``b`` and ``o`` the bytes of both operands and of the result, and ``p`` the result as partial sums:

    * keep tiles of the first operand with their results: ``a + ceil((a + p)/S) * b + o``
    * keep tiles of the second operand: ``ceil(b/S) * a + b + o``, and ``2 p`` for each tile but the first, whose
      partial results come back

    so each tensor moves once (the compulsory traffic) as soon as one of the two fits into ``S``. Independent products
    (batches) are mapped one after the other.

    Args:
        product: What to map.
        buffer_bytes: Size of the on-chip memory in bytes.
        accumulator_bits: Width of partial sums.
    """
    half, n = buffer_bytes / 2, product.batches
    a, b, o = product.a.bytes / n, product.b.bytes / n, product.out.bytes / n
    partial = product.out.numel * accumulator_bits / 8 / n
    tiles_a, tiles_b = _tiles(a + partial, half), _tiles(b, half)
    choices = (
        Traffic(a, tiles_a * b, o, "first operand kept"),
        Traffic(tiles_b * a, b, o + 2 * (tiles_b - 1) * partial, "second operand kept"),
    )
    best = min(choices, key=lambda choice: choice.total_bytes)
    return Traffic(best.a * n, best.b * n, best.out * n, best.kept)


def _tiles(size: float, buffer: float) -> int:
    return max(1, math.ceil(size / buffer))
