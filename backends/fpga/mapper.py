r"""From loop nests to traffic: tiling, stationarity and the spread over the array, chosen to cost least.

Each memory holds one tile of each of the three tensors. The loops that step through the tiles stand in an order that
keeps one tensor, the stationary one, in place while the loops irrelevant for it run; in any order at most one tensor
gains from that, because the innermost loop is relevant for the two others, so the choice among three is a choice among
all orders. Bytes follow in closed form:

* a tensor that is read moves ``elements * trips of its irrelevant loops``, without the trips where it is stationary;
  elements that overlapping windows share count once for each tile;
* a tensor that is written likewise; each visit but the first fetches partial sums, each but the last stores them, at
  the width of the accumulator.

A tile that is replaced while the nest runs needs its room twice (double buffering). Traffic never grows with a tile, so
for given tiles of all other loops the largest batch tile that fits is best, and of all tile sizes that take the same
number of trips the smallest: the search runs over those alone, at once in numpy, and still finds the optimum of all
tile sizes and orders. Kernels are cut only where nothing else fits. A tile holds at least what the array works on at
once, in whole rounds of the axis that the second output dimension is spread over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from e2pass.backends.fpga.nest import Name, Nest, Window

Objective = Literal["energy", "latency"]
Grid = npt.NDArray[np.float64]
NAMES: tuple[Name, ...] = ("x", "w", "y")


class Level(NamedTuple):
    """A memory, as the mapper sees it."""

    name: str
    size_bytes: float
    bytes_per_cycle: float
    pj_per_byte: float


class ArrayShape(NamedTuple):
    """An output-stationary array: partial sums stay in the processing elements until a tile is reduced."""

    rows: int
    columns: int
    accumulator_bits: int


class Goal(NamedTuple):
    """What to minimise, and the fixed power that time costs, in pJ per cycle."""

    objective: Objective
    fixed_pj_per_cycle: float


@dataclass(frozen=True)
class Tiling:
    """Tile sizes of one memory, and what they let cross its outer edge.

    Attributes:
        tile: The loop nest within one tile.
        stationary: The tensor that stays while its irrelevant loops run.
        moved: Elements of each tensor that cross the edge; for the one that is written, visits.
        partial: Visits of the written tensor by all tiles, also where it is stationary.
    """

    tile: Nest
    stationary: Name
    moved: Mapping[Name, float]
    partial: float


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
        load = _Load(cycles / repeats, fed / repeats, outer, level)
        tiling = _tile(inner, load, spread, array.accumulator_bits, goal)
        if tiling is None:
            return None
        moved = _edge_bytes(nest, {n: v * repeats for n, v in tiling.moved.items()}, array.accumulator_bits)
        for name, amount in moved.items():
            traffic[outer.name][name] += amount
            traffic[level.name][name] += amount
        visits = tiling.partial * repeats
        tilings.insert(0, tiling)
        inner, repeats = tiling.tile, nest.macs / tiling.tile.macs
    taken[nest.writes] = visits
    for name, amount in _edge_bytes(nest, taken, array.accumulator_bits).items():
        traffic[levels[0].name][name] += amount
    return Mapped(traffic, spread.utilisation, _text(tilings[-1]), tuple(tilings))


def _edge_bytes(nest: Nest, moved: Mapping[Name, float], accumulator_bits: int) -> dict[Name, float]:
    """Bytes that cross an edge, by tensor."""
    return {name: float(_bytes(nest, {name: np.asarray(v)}, accumulator_bits)) for name, v in moved.items()}


def _text(tiling: Tiling) -> str:
    tile = tiling.tile
    sizes = {"B": tile.b, "K": tile.k, "C": tile.c}
    sizes |= dict(zip(("O1", "O2", "O3"), (v.out for v in tile.windows), strict=False))
    return f"tile {' '.join(f'{k}={v}' for k, v in sizes.items())}, {tiling.stationary} stationary"


class _Spread(NamedTuple):
    """How the two output dimensions lie on the array, and what a tile must hold of them and of the groups for that."""

    utilisation: float
    first_shared: float
    second_shared: float
    first: int
    second: int
    groups: int


@lru_cache(maxsize=65536)
def _spread(nest: Nest, array: ArrayShape) -> _Spread:
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
                _Spread(
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


@lru_cache(maxsize=4096)
def _splits(size: int) -> npt.NDArray[np.int64]:
    """The smallest tile for each number of trips, ascending."""
    found, tile = [], size
    while True:
        found.append(tile)
        if tile == 1:
            return np.array(found[::-1], dtype=np.int64)
        tile = math.ceil(size / math.ceil(size / (tile - 1)))


class _Load(NamedTuple):
    """What one run of a nest asks of array and memories, whatever its tiling."""

    cycles: float
    array_bytes: float
    outer: Level
    level: Level


def _tile(nest: Nest, load: _Load, spread: _Spread, accumulator_bits: int, goal: Goal) -> Tiling | None:
    for whole_kernels in (True, False):
        space = _Space(nest, load.level.size_bytes, spread, accumulator_bits, whole_kernels)
        if space.fits.any():
            return _search(space, load, accumulator_bits, goal)
    return None


def _search(space: _Space, load: _Load, accumulator_bits: int, goal: Goal) -> Tiling:
    nest, (cycles, fed, outer, level) = space.nest, load
    inside = fed + _bytes(nest, {nest.writes: space.partial}, accumulator_bits)
    best: tuple[tuple[float, float], Name, tuple[int, ...]] | None = None
    for stationary, moved in zip(NAMES, space.moved, strict=True):
        crossing = _bytes(nest, moved, accumulator_bits)
        time = np.maximum(crossing / outer.bytes_per_cycle, (crossing + inside) / level.bytes_per_cycle)
        time = np.maximum(time, cycles)
        energy = crossing * outer.pj_per_byte + (crossing + inside) * level.pj_per_byte + time * goal.fixed_pj_per_cycle
        first, then = (energy, time) if goal.objective == "energy" else (time, energy)
        first = np.where(space.fits, first, np.inf)
        lowest = float(first.min())
        near = np.where(first <= lowest * (1 + 1e-12), then, np.inf)
        index = tuple(int(i) for i in np.unravel_index(int(near.argmin()), near.shape))
        key = (lowest, float(near[index]))
        if best is None or key < best[0]:
            best = (key, stationary, index)
    assert best is not None
    return space.tiling(best[1], best[2])


def _bytes(nest: Nest, moved: Mapping[Name, Grid], accumulator_bits: int) -> Grid:
    """Bytes of the tensors in ``moved``, in elements; partial sums cross both ways."""
    total: Any = 0.0
    for name, amount in moved.items():
        if name == nest.writes:
            again = np.maximum(amount - nest.touched(name), 0)
            total = total + (nest.elements(name) * nest.bits(name) + 2 * again * accumulator_bits) / 8
        else:
            total = total + amount * nest.bits(name) / 8
    return np.asarray(total, dtype=np.float64)


class _Space:
    """All tilings of a nest that are worth a look: an axis for K, C and each window; the batch in closed form."""

    def __init__(
        self, nest: Nest, size_bytes: float, spread: _Spread, accumulator_bits: int, whole_kernels: bool
    ) -> None:
        self.nest, self.groups = nest, min(nest.g, spread.groups)
        axes = 2 + len(nest.windows)
        rounds_k, rounds_c = (1, spread.second) if nest.writes == "x" else (spread.second, 1)
        self.k, self.c = _axis(_rounds(nest.k, rounds_k), 0, axes), _axis(_rounds(nest.c, rounds_c), 1, axes)
        self.outs = [_axis(_splits(v.out), 2 + i, axes) for i, v in enumerate(nest.windows)]
        self.taps = [v.kernel if whole_kernels else 1 for v in nest.windows]
        self.shape = np.broadcast_shapes(self.k.shape, self.c.shape, *(o.shape for o in self.outs))
        trips_k, trips_c = _trips(nest.k, self.k), _trips(nest.c, self.c)
        taps_in_tile = math.prod(self.taps)
        trips_o: Any = math.prod(_trips(v.out, o) for v, o in zip(nest.windows, self.outs, strict=True))
        trips_f = math.prod(math.ceil(v.kernel / t) for v, t in zip(nest.windows, self.taps, strict=True))
        reach: Any = math.prod(_table(v, o, t, Window.reach) for v, o, t in self._windows())
        rows: Any = math.prod(_table(v, o, t, Window.moved) for v, o, t in self._windows())
        bits = {n: accumulator_bits if n == nest.writes else nest.bits(n) for n in NAMES}
        w_tile = self.groups * self.k * self.c * taps_in_tile * bits["w"] / 8
        x_row = self.groups * self.c * reach * bits["x"] / 8
        y_row = self.groups * self.k * math.prod(self.outs) * bits["y"] / 8
        changes = np.asarray(nest.g > self.groups)
        x_changes = changes | (trips_c * trips_o * trips_f > 1)
        y_changes = changes | (trips_k * trips_o > 1)
        w_room = w_tile * np.where(changes | (trips_k * trips_c * trips_f > 1), 2, 1)
        whole = w_room + nest.b * (x_row * np.where(x_changes, 2, 1) + y_row * np.where(y_changes, 2, 1))
        largest = np.floor((size_bytes - w_room) / (2 * (x_row + y_row)))
        batch = np.where(whole <= size_bytes, nest.b, np.minimum(largest, nest.b - 1))
        at_once: Any = {"y": batch * math.prod(self.outs), "x": batch * reach, "w": self.c * taps_in_tile}[nest.writes]
        self.fits = np.broadcast_to((batch >= 1) & (at_once >= min(nest.parallel[0], spread.first)), self.shape)
        batch = np.maximum(batch, 1)
        trips_b = np.ceil(nest.b / batch)
        self.batch = np.broadcast_to(np.ceil(nest.b / trips_b), self.shape)
        fetched = {
            "x": np.asarray(nest.b * nest.c * nest.g * rows, dtype=np.float64),
            "w": np.asarray(float(nest.elements("w"))),
            "y": np.asarray(float(nest.elements("y"))),
        }
        trips = {"x": trips_k, "w": trips_b * trips_o, "y": trips_c * trips_f}
        each: dict[Name, Grid] = {n: self._spread(fetched[n] * trips[n]) for n in NAMES}
        self.moved = [{**each, kept: self._spread(fetched[kept] * 1.0)} for kept in NAMES]
        self.partial = each[nest.writes]

    def _windows(self) -> list[tuple[Window, npt.NDArray[np.int64], int]]:
        return list(zip(self.nest.windows, self.outs, self.taps, strict=True))

    def _spread(self, values: Any) -> Grid:
        return np.broadcast_to(np.asarray(values, dtype=np.float64), self.shape)

    def tiling(self, stationary: Name, index: tuple[int, ...]) -> Tiling:
        """The tiling at a point of the space."""
        at = {n: float(v[index]) for n, v in self.moved[NAMES.index(stationary)].items()}
        windows = []
        for i, (window, outs, taps) in enumerate(self._windows()):
            out = int(outs.reshape(-1)[index[2 + i]])
            windows.append(replace(window, out=out, kernel=taps, size=window.reach(out, taps), padding=0))
        tile = replace(
            self.nest, b=int(self.batch[index]), k=int(self.k.reshape(-1)[index[0]]),
            c=int(self.c.reshape(-1)[index[1]]), windows=tuple(windows), g=self.groups,
        )  # fmt: skip
        return Tiling(tile, stationary, at, float(self.partial[index]))


def _rounds(size: int, axis: int) -> npt.NDArray[np.int64]:
    """Tile sizes in whole rounds of an axis of the array."""
    return np.minimum(_splits(math.ceil(size / axis)) * axis, size)


def _axis(values: npt.NDArray[np.int64], position: int, axes: int) -> npt.NDArray[np.int64]:
    return values.reshape([-1 if i == position else 1 for i in range(axes)])


def _trips(size: int, tiles: npt.NDArray[np.int64]) -> Any:
    return -(-size // tiles)


def _table(window: Window, tiles: npt.NDArray[np.int64], taps: int, count: Any) -> Any:
    values = [count(window, int(tile), taps) for tile in tiles.reshape(-1)]
    return np.array(values, dtype=np.int64).reshape(tiles.shape)
