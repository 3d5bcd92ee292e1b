"""From loop nests to traffic: tiling, stationarity and the spread over the array, chosen to cost least.

Each memory is tiled on its own, from the outside in (``tilings.py``); the array inside spreads both output dimensions
over its rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from e2pass.backends.fpga.nest import Name, Nest
from e2pass.backends.fpga.tilings import NAMES, Goal, Level, Load, Spread, Tiling, best_tiling, edge_bytes


class ArrayShape(NamedTuple):
    """An output-stationary array: partial sums stay in the processing elements until a tile is reduced."""

    rows: int
    columns: int
    accumulator_bits: int


@dataclass(frozen=True)
class Mapped:
    """Traffic of a nest on a machine.

    Attributes:
        traffic_bytes: Bytes by memory and tensor: what crosses the outer edge of the level below, fills of the level
            itself, and for the innermost memory what the array reads and writes.
        utilisation: Share of the array that works, from 0 to 1.
        text: Tiles and stationarity, for reports.
        tilings: Tiling of each memory on the chip, from the inside out.
    """

    traffic_bytes: Mapping[str, Mapping[str, float]]
    utilisation: float
    text: str
    tilings: tuple[Tiling, ...] = ()


@lru_cache(maxsize=65536)
def map_nest(
    nest: Nest, levels: tuple[Level, ...], array: ArrayShape, macs_per_cycle: float, goal: Goal
) -> Mapped | None:
    """Map a nest, memory by memory from the outside in; None if not even single elements fit into some memory.

    Args:
        nest: What to map.
        levels: Memories from the inside out; the last is off the chip and holds everything.
        array: The processing array.
        macs_per_cycle: Rate of the array when all of it works.
        goal: What to minimise.
    """
    spread = _spread(nest, array)
    cycles = nest.macs / (macs_per_cycle * spread.utilisation)
    first, second = nest.reads
    taken: dict[Name, float] = {first: nest.macs / spread.first_shared, second: nest.macs / spread.second_shared}
    fed = sum(amount * nest.bits(name) / 8 for name, amount in taken.items())
    traffic: dict[str, dict[str, float]] = {level.name: dict.fromkeys(NAMES, 0.0) for level in levels}
    tilings: list[Tiling] = []
    inner, repeats = nest, 1.0
    for outer, level in zip(levels[:0:-1], levels[-2::-1], strict=True):
        load = Load(cycles / repeats, fed / repeats, outer, level)
        tiling = best_tiling(inner, load, spread, array.accumulator_bits, goal)
        if tiling is None:
            return None
        moved = _edge_by_tensor(nest, {n: v * repeats for n, v in tiling.moved.items()}, array.accumulator_bits)
        for name, amount in moved.items():
            traffic[outer.name][name] += amount
            traffic[level.name][name] += amount
        visits = tiling.partial * repeats
        tilings.insert(0, tiling)
        inner, repeats = tiling.tile, nest.macs / tiling.tile.macs
    taken[nest.writes] = visits
    for name, amount in _edge_by_tensor(nest, taken, array.accumulator_bits).items():
        traffic[levels[0].name][name] += amount
    return Mapped(traffic, spread.utilisation, _text(tilings[-1]), tuple(tilings))


def _edge_by_tensor(nest: Nest, moved: Mapping[Name, float], accumulator_bits: int) -> dict[Name, float]:
    """Bytes that cross an edge, by tensor."""
    return {name: float(edge_bytes(nest, {name: np.asarray(v)}, accumulator_bits)) for name, v in moved.items()}


def _text(tiling: Tiling) -> str:
    tile = tiling.tile
    sizes = {"B": tile.b, "K": tile.k, "C": tile.c}
    sizes |= dict(zip(("O1", "O2", "O3"), (v.out for v in tile.windows), strict=False))
    return f"tile {' '.join(f'{k}={v}' for k, v in sizes.items())}, {tiling.stay}"


@lru_cache(maxsize=65536)
def _spread(nest: Nest, array: ArrayShape) -> Spread:
    """Spread both output dimensions over rows and columns, groups beside either.

    An operand is shared by the elements along the axis of the dimension that it lacks. Most of the array in use is
    best, then least reading.
    """
    choices = []
    first, second = nest.parallel
    for one, other in ((array.rows, array.columns), (array.columns, array.rows)):
        for groups_first in (True, False):
            g = nest.g
            used = _used(first * g, one) * _used(second, other) if groups_first else (
                _used(first, one) * _used(second * g, other))  # fmt: skip
            size, axis = (first, one) if groups_first else (second, other)
            choices.append(
                Spread(
                    used,
                    _shared(second, other),
                    _shared(first, one),
                    min(first, one),
                    min(second, other),
                    min(g, math.ceil(axis / size)),
                )
            )
    a, b = (nest.bits(name) for name in nest.reads)
    return max(choices, key=lambda s: (round(s.utilisation, 12), -(a / s.first_shared + b / s.second_shared)))


def _shared(size: int, axis: int) -> float:
    """Elements along an axis, averaged over the rounds that it takes."""
    return size / math.ceil(size / axis)


def _used(size: int, axis: int) -> float:
    return size / (math.ceil(size / axis) * axis)
