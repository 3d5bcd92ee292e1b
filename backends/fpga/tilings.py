"""The tilings of one memory: tile sizes, what stays in it, and what crosses its outer edge.

Each memory holds a part of each of the three tensors. The loops that step through the tiles fall into three groups, by
the tensor that they are irrelevant for: K for x, batch and output positions for w, C and taps for y. In whatever order
the groups stand, the tensor of the innermost one, the stationary one, stays in place while its loops run. That of the
next group stays as well if the memory holds its tiles of all innermost loops, a row; and any tensor stays that the
memory holds whole. A tensor for which there is no such room comes anew for each turn of its group. Bytes follow in
closed form:

* a tensor that is read moves ``elements * trips of its irrelevant loops``, or its elements once where it stays;
  elements that overlapping windows share count once for each tile of positions that comes anew;
* a tensor that is written likewise; each visit but the first fetches partial sums, each but the last stores them, at
  the width of the accumulator.

What is replaced while the nest runs needs its room twice (double buffering). Traffic never grows with a tile, so
for given tiles of all other loops the largest batch tile that fits is best, and of all tile sizes that take the same
number of trips the smallest: the search runs over those alone, at once in numpy, and still finds the optimum of all
tile sizes, orders of the groups and choices of what stays. (Positions of a dilated window are the exception: all
sizes are tried up to 16 of them, beyond that equal tiles may fetch some overlap more than the best.) Kernels are cut
only where nothing else fits. A tile holds at least what the array works on at once, in whole rounds of the axis that
the second output dimension is spread over.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations
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


class Stay(NamedTuple):
    """Which tensors stay in a memory while the loops irrelevant for them run.

    Attributes:
        tile: The stationary one, of which a tile is held.
        row: One of which all tiles of the innermost loops are held, None if none.
        whole: Those that are held whole.
    """

    tile: Name
    row: Name | None = None
    whole: tuple[Name, ...] = ()

    def keeps(self, name: Name) -> bool:
        """Whether a tensor stays, in one way or another."""
        return name in (self.tile, self.row, *self.whole)

    def across(self, name: Name) -> tuple[Name, ...]:
        """Groups of loops, each named by the tensor it is irrelevant for, whose tiles of ``name`` are held at once."""
        if name in self.whole:
            return tuple(loops for loops in NAMES if loops != name)
        return (self.tile,) if name == self.row else ()

    def __str__(self) -> str:
        held = [f", {self.row} held by rows"] if self.row else []
        held += [f", {name} held whole" for name in self.whole]
        return f"{self.tile} stationary{''.join(held)}"


def _stays() -> Iterator[Stay]:
    for count in range(len(NAMES)):
        for whole in combinations(NAMES, count):
            rest = [name for name in NAMES if name not in whole]
            for tile in rest:
                yield from (Stay(tile, row, whole) for row in (None, *(n for n in rest if n != tile)))


STAYS = tuple(_stays())


class Goal(NamedTuple):
    """What to minimise, and the fixed power that time costs, in pJ per cycle."""

    objective: Objective
    fixed_pj_per_cycle: float


@dataclass(frozen=True)
class Tiling:
    """Tile sizes of one memory, and what they let cross its outer edge.

    Attributes:
        tile: The loop nest within one tile.
        stay: The tensors that stay while their irrelevant loops run.
        moved: Elements of each tensor that cross the edge; for the one that is written, visits.
        partial: Visits of the written tensor by all tiles, also where it is stationary.
    """

    tile: Nest
    stay: Stay
    moved: Mapping[Name, float]
    partial: float


class Spread(NamedTuple):
    """How the two output dimensions lie on the array, and what a tile must hold of them and of the groups for that."""

    utilisation: float
    first_shared: float
    second_shared: float
    first: int
    second: int
    groups: int


class Load(NamedTuple):
    """What one run of a nest asks of array and memories, whatever its tiling."""

    cycles: float
    array_bytes: float
    outer: Level
    level: Level


def best_tiling(nest: Nest, load: Load, spread: Spread, accumulator_bits: int, goal: Goal) -> Tiling | None:
    """Return the tiling of a memory that costs least; None if not even single elements fit."""
    once = edge_bytes(nest, {nest.writes: np.asarray(nest.touched(nest.writes))}, accumulator_bits)
    least = _cost(np.asarray(nest.compulsory_bytes), once, load, goal)[0]
    for whole_kernels in (True, False):
        space = _Space(nest, spread, accumulator_bits, whole_kernels)
        best: _Found | None = None
        for stay in STAYS:
            if not whole_kernels and stay != Stay(stay.tile):
                continue  # cut kernels are the last resort, for memories that hold single tiles
            found = _search(space.with_room(stay, load.level.size_bytes), load, goal)
            if found is not None and (best is None or found.cost < best.cost):
                best = found
                if best.cost[0] <= least * (1 + 1e-12):
                    break
        if best is not None:
            return space.tiling(best.room, best.place)
    return None


def _cost(crossing: Grid, inside: Grid, load: Load, goal: Goal) -> tuple[Grid, Grid]:
    """Energy and time, or the other way round, by what crosses the outer edge and what the array writes and reads."""
    cycles, fed, outer, level = load
    through = crossing + inside + fed
    time = np.maximum(np.maximum(crossing / outer.bytes_per_cycle, through / level.bytes_per_cycle), cycles)
    energy = crossing * outer.pj_per_byte + through * level.pj_per_byte + time * goal.fixed_pj_per_cycle
    return (energy, time) if goal.objective == "energy" else (time, energy)


class _Found(NamedTuple):
    """The best tiling with some tensors that stay: its cost, and where it stands in the space."""

    cost: tuple[float, float]
    room: _Room
    place: tuple[int, ...]


def _search(room: _Room, load: Load, goal: Goal) -> _Found | None:
    if not room.fits.any():
        return None
    first, then = _cost(room.crossing, room.inside, load, goal)
    first = np.where(room.fits, first, np.inf)
    lowest = float(first.min())
    near = np.where(first <= lowest * (1 + 1e-12), then, np.inf)
    index = tuple(int(i) for i in np.unravel_index(int(near.argmin()), near.shape))
    return _Found((lowest, float(near[index])), room, index)


def edge_bytes(nest: Nest, moved: Mapping[Name, Grid], accumulator_bits: int) -> Grid:
    """Bytes of the tensors in ``moved``, in elements; partial sums cross both ways."""
    total: Any = 0.0
    for name, amount in moved.items():
        if name == nest.writes:
            again = np.maximum(amount - nest.touched(name), 0)
            total = total + (nest.elements(name) * nest.bits(name) + 2 * again * accumulator_bits) / 8
        else:
            total = total + amount * nest.bits(name) / 8
    return np.asarray(total, dtype=np.float64)


class _Room(NamedTuple):
    """What a choice of tensors that stay makes of every tiling of a space.

    Attributes:
        stay: The choice.
        fits: Whether it fits.
        batch: The largest batch tile that does.
        moved: Elements of each tensor that cross the outer edge.
        partial: Visits of the written tensor by all tiles.
        crossing: Bytes that cross the outer edge.
        inside: Bytes of the written tensor between the memory and the array.
    """

    stay: Stay
    fits: npt.NDArray[np.bool_]
    batch: Grid
    moved: Mapping[Name, Grid]
    partial: Grid
    crossing: Grid
    inside: Grid


class _Space:
    """All tilings of a nest that are worth a look: an axis for K, C and each window; the batch in closed form."""

    def __init__(self, nest: Nest, spread: Spread, accumulator_bits: int, whole_kernels: bool) -> None:
        self.nest, self.spread, self.accumulator_bits = nest, spread, accumulator_bits
        self.groups = min(nest.g, spread.groups)
        axes = 2 + len(nest.windows)
        rounds_k, rounds_c = (1, spread.second) if nest.writes == "x" else (spread.second, 1)
        self.k, self.c = _axis(_rounds(nest.k, rounds_k), 0, axes), _axis(_rounds(nest.c, rounds_c), 1, axes)
        self.outs = [_axis(_outs(v), 2 + i, axes) for i, v in enumerate(nest.windows)]
        self.taps = [v.kernel if whole_kernels else 1 for v in nest.windows]
        self.shape = np.broadcast_shapes(self.k.shape, self.c.shape, *(o.shape for o in self.outs))
        trips_f = math.prod(math.ceil(v.kernel / t) for v, t in zip(nest.windows, self.taps, strict=True))
        trips_o: Any = math.prod(_trips(v.out, o) for v, o in zip(nest.windows, self.outs, strict=True))
        # By the tensor that the loops are irrelevant for; those of w without the batch.
        self.trips: dict[Name, Any] = {"x": _trips(nest.k, self.k), "w": trips_o, "y": _trips(nest.c, self.c) * trips_f}
        self.reach: Any = math.prod(_table(v, o, t, Window.reach) for v, o, t in self._windows())
        self.rows: Any = math.prod(_table(v, o, t, Window.moved) for v, o, t in self._windows())
        self.positions: Any = math.prod(self.outs)

    def with_room(self, stay: Stay, size_bytes: float) -> _Room:
        """The largest batch tiles that leave room for what stays, and what moves then."""
        nest = self.nest
        fixed, single, double = self._room(stay)
        whole = fixed + nest.b * single <= size_bytes
        largest = np.floor((size_bytes - fixed) / np.maximum(double, 1e-9))
        batch = np.where(whole, nest.b, np.minimum(largest, nest.b - 1))
        at_once = self._at_once(batch)
        # Cut kernels hold fewer positions than whole ones: the most that these tiles can hold will do.
        wanted = min(nest.parallel[0], self.spread.first, int(np.max(self._at_once(nest.b))))
        fits = np.broadcast_to((batch >= 1) & (at_once >= wanted), self.shape)
        trips_b = np.ceil(nest.b / np.maximum(batch, 1))
        trips = {**self.trips, "w": self.trips["w"] * trips_b}
        anew: dict[Name, Grid] = {n: self._grid(self._fetched(n, ()) * trips[n]) for n in NAMES}
        once: dict[Name, Grid] = {n: self._grid(self._fetched(n, stay.across(n))) for n in NAMES if stay.keeps(n)}
        moved, partial = {**anew, **once}, anew[nest.writes]
        crossing = edge_bytes(nest, moved, self.accumulator_bits)
        inside = edge_bytes(nest, {nest.writes: partial}, self.accumulator_bits)
        return _Room(stay, fits, self._grid(np.ceil(nest.b / trips_b)), moved, partial, crossing, inside)

    def _at_once(self, batch: Any) -> Any:
        """Elements of the first dimension that the array spreads, in a tile of ``batch`` samples."""
        sizes: dict[Name, Any] = {
            "y": batch * self.positions, "x": batch * self.reach, "w": self.c * math.prod(self.taps),
        }  # fmt: skip
        return sizes[self.nest.writes]

    def _room(self, stay: Stay) -> tuple[Any, Any, Any]:
        """Bytes whatever the batch tile is, and for each of its samples: with a whole batch, and with a cut one."""
        fixed, single, double = 0.0, 0.0, 0.0
        for name in NAMES:
            held = stay.across(name)
            bits = self.accumulator_bits if name == self.nest.writes else self.nest.bits(name)
            size = self.groups * self._extent(name, held) * bits / 8
            steps = [self.trips[loops] for loops in NAMES if loops != name and loops not in held]
            changes = np.asarray(math.prod(steps) * math.ceil(self.nest.g / self.groups) > 1)
            if name == "w" or "w" in held:
                fixed = fixed + size * np.where(changes, 2, 1)
            else:
                single = single + size * np.where(changes, 2, 1)
                double = double + 2 * size
        return fixed, single, double

    def _extent(self, name: Name, held: tuple[Name, ...]) -> Any:
        """Elements of a group of channels that are held at once; of a sample, unless all positions are held."""
        nest = self.nest
        k, c = nest.k if "x" in held else self.k, nest.c if "y" in held else self.c
        if name == "w":
            return k * c * math.prod(self.taps)
        if "w" in held:
            reach = math.prod(v.reach(v.out, v.kernel) for v in nest.windows)
            return nest.b * (c * reach if name == "x" else k * nest.positions)
        return c * self.reach if name == "x" else k * self.positions

    def _fetched(self, name: Name, held: tuple[Name, ...]) -> Any:
        """Elements that cross the edge each time that the tensor is gone through."""
        if name == "x" and "w" not in held:
            return np.asarray(self.nest.b * self.nest.c * self.nest.g * self.rows, dtype=np.float64)
        return float(self.nest.touched(name))

    def _windows(self) -> list[tuple[Window, npt.NDArray[np.int64], int]]:
        return list(zip(self.nest.windows, self.outs, self.taps, strict=True))

    def _grid(self, values: Any) -> Grid:
        return np.broadcast_to(np.asarray(values, dtype=np.float64), self.shape)

    def tiling(self, room: _Room, index: tuple[int, ...]) -> Tiling:
        """The tiling at a point of the space."""
        at = {n: float(v[index]) for n, v in room.moved.items()}
        windows = []
        for i, (window, outs, taps) in enumerate(self._windows()):
            out = int(outs.reshape(-1)[index[2 + i]])
            windows.append(replace(window, out=out, kernel=taps, size=window.reach(out, taps), padding=0))
        tile = replace(
            self.nest, b=int(room.batch[index]), k=int(self.k.reshape(-1)[index[0]]),
            c=int(self.c.reshape(-1)[index[1]]), windows=tuple(windows), g=self.groups,
        )  # fmt: skip
        return Tiling(tile, room.stay, at, float(room.partial[index]))


def _rounds(size: int, axis: int) -> npt.NDArray[np.int64]:
    """Tile sizes in whole rounds of an axis of the array."""
    return np.minimum(_splits(math.ceil(size / axis)) * axis, size)


FEW = 16
"""Output positions of a dilated window up to which every tile size is tried."""


def _outs(window: Window) -> npt.NDArray[np.int64]:
    """Tile sizes of the output positions.

    Under dilation a tile has gaps that its neighbours meet, so that unequal tiles can fetch less than equal ones.
    """
    every = window.dilation > 1 and window.out <= FEW
    return np.arange(1, window.out + 1) if every else _splits(window.out)


def _axis(values: npt.NDArray[np.int64], position: int, axes: int) -> npt.NDArray[np.int64]:
    return values.reshape([-1 if i == position else 1 for i in range(axes)])


def _trips(size: int, tiles: npt.NDArray[np.int64]) -> Any:
    return -(-size // tiles)


def _table(window: Window, tiles: npt.NDArray[np.int64], taps: int, count: Any) -> Any:
    values = [count(window, int(tile), taps) for tile in tiles.reshape(-1)]
    return np.array(values, dtype=np.int64).reshape(tiles.shape)


@lru_cache(maxsize=4096)
def _splits(size: int) -> npt.NDArray[np.int64]:
    """The smallest tile for each number of trips, ascending."""
    found, tile = [], size
    while True:
        found.append(tile)
        if tile == 1:
            return np.array(found[::-1], dtype=np.int64)
        tile = math.ceil(size / math.ceil(size / (tile - 1)))
