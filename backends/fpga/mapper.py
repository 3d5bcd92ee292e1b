"""How often each operand of a product crosses the edge of the chip: a closed form, no search."""

from __future__ import annotations

import math
from typing import NamedTuple

from e2pass.backends.fpga.workload import Product

ACCUMULATOR_BYTES = 4
"""Partial sums that stay on chip are 32 bits wide."""


class Traffic(NamedTuple):
    """Off-chip bytes of a product, and what was kept on the chip."""

    total_bytes: float
    kept: str


def map_product(product: Product, buffer_bytes: float) -> Traffic:
    r"""Choose the operand to keep on the chip so that the off-chip traffic is least.

    Half of the on-chip memory holds tiles of the kept tensor, the other half streams the rest; ``S`` is that half.
    With ``a``, ``b`` and ``o`` the bytes of both operands and of the result, and ``o32`` the result as 32-bit partial
    sums, the choices are

    * keep tiles of the first operand: ``a + ceil(a/S) * b + o``
    * keep tiles of the second operand: ``ceil(b/S) * a + b + o``
    * keep tiles of the result: ``max(a, b) + ceil(o32/S) * min(a, b) + o``

    so each tensor moves once (the compulsory traffic) as soon as one of the three fits into ``S``. Independent
    products (batches) are mapped one after the other. Tiles are cut along outer dimensions only: a lower bound for
    this family of loop orders, not the optimum over all of them.

    Args:
        product: What to map.
        buffer_bytes: Size of the on-chip memory in bytes.
    """
    half = buffer_bytes / 2
    n = product.batches
    a, b, o = product.a.bytes / n, product.b.bytes / n, product.out.bytes / n
    partial = product.out.numel * ACCUMULATOR_BYTES / n
    choices = (
        Traffic(a + _tiles(a, half) * b + o, "first operand kept"),
        Traffic(_tiles(b, half) * a + b + o, "second operand kept"),
        Traffic(max(a, b) + _tiles(partial, half) * min(a, b) + o, "result kept"),
    )
    best = min(choices, key=lambda choice: choice.total_bytes)
    return Traffic(best.total_bytes * n, best.kept)


def _tiles(size: float, buffer: float) -> int:
    return max(1, math.ceil(size / buffer))
