"""The mapper against exhaustive search by simulation, compulsory traffic and published lower bounds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from e2pass.backends.fpga import FpgaCostModel, Product
from e2pass.backends.fpga.fused import map_product
from e2pass.backends.fpga.mapper import ArrayShape, Mapped, map_nest
from e2pass.backends.fpga.nest import Name, Nest, Window, product
from e2pass.backends.fpga.tilings import NAMES, Goal, Level, Objective
from tests.backends.fpga_.bench import bench, q
from tests.backends.fpga_.sites import T, conv, priced

ARRAY = ArrayShape(1, 1, 32)
ENERGY = Goal("energy", 0.0)
OBJECTIVES: tuple[Objective, ...] = ("latency", "energy")


def mapped(nest: Nest, size_bytes: float, dram_pj: float = 100.0, sram_pj: float = 1.0) -> Mapped:
    levels = (Level("sram", size_bytes, 1e9, sram_pj), Level("dram", 1e12, 1e9, dram_pj))
    found = map_nest(nest, levels, ARRAY, 1.0, ENERGY)
    assert found is not None
    return found


def off_chip(found: Mapped) -> float:
    return sum(found.traffic_bytes["dram"].values())


# -- exhaustive search: every tile size, order of the loops and buffer, walked step by step ----------------------------


class Walk:
    """Bytes and room of one tiling, by walking over the tiles and looking at what changes."""

    def __init__(self, nest: Nest, tiles: tuple[int, ...]) -> None:
        self.nest, self.tiles = nest, tiles
        self.sizes = (nest.b, nest.k, nest.c, *(v.out for v in nest.windows))
        self.trips = [math.ceil(size / tile) for size, tile in zip(self.sizes, tiles, strict=True)]
        loops = {"b": 0, "k": 1, "c": 2}
        outs = list(range(3, len(self.sizes)))
        self.relevant: dict[Name, list[int]] = {
            "x": [loops["b"], loops["c"], *outs], "w": [loops["k"], loops["c"]], "y": [loops["b"], loops["k"], *outs],
        }  # fmt: skip

    def loops(self, group: Name) -> list[int]:
        """The loops that are irrelevant for a tensor."""
        return [d for d in range(len(self.sizes)) if d not in self.relevant[group]]

    def indices(self, dim: int, at: dict[int, int]) -> range:
        """What a buffer holds of a loop: the tile that the loop stands at, or all of it where no loop outside does."""
        if dim not in at:
            return range(self.sizes[dim])
        first = at[dim] * self.tiles[dim]
        return range(first, min(first + self.tiles[dim], self.sizes[dim]))

    def elements(self, name: Name, at: dict[int, int]) -> int:
        count = math.prod(len(self.indices(d, at)) for d in self.relevant[name] if d < 3)
        for dim, v in enumerate(self.nest.windows, 3):
            outs = self.indices(dim, at)
            if name == "x":
                met = {o * v.stride + f * v.dilation - v.padding for o in outs for f in range(v.kernel)}
                count *= len(met & set(range(v.size)))
            else:
                count *= len(outs) if name == "y" else v.kernel
        return count

    def room(self, name: Name, outside: tuple[int, ...]) -> float:
        """Bytes of a buffer inside of some loops, twice where they change what it holds."""
        held = {d: self.tiles[d] if d in outside else self.sizes[d] for d in self.relevant[name]}
        size = math.prod(n for d, n in held.items() if d < 3)
        for dim, v in enumerate(self.nest.windows, 3):
            size *= v.kernel if name == "w" else v.reach(held[dim], v.kernel) if name == "x" else held[dim]
        bits = 32 if name == self.nest.writes else self.nest.bits(name)
        changes = any(self.trips[d] > 1 for d in outside if d in self.relevant[name])
        return size * bits / 8 * (2 if changes else 1)

    def moved(self, name: Name, outside: tuple[int, ...]) -> int:
        """Elements that enter a buffer while the loops outside of it run, in this order."""
        total, held = 0, None
        for steps in itertools.product(*(range(self.trips[d]) for d in outside)):
            at = dict(zip(outside, steps, strict=True))
            wanted = tuple(at[d] for d in outside if d in self.relevant[name])
            if wanted != held:
                total, held = total + self.elements(name, at), wanted
        return total

    def visits(self) -> int:
        """Elements of the written tensor that all tiles visit."""
        steps = itertools.product(*(range(trips) for trips in self.trips))
        return sum(self.elements(self.nest.writes, dict(enumerate(at))) for at in steps)

    def bytes(self, name: Name, moved: int) -> float:
        """Bytes across an edge; partial sums cross both ways."""
        if name != self.nest.writes:
            return moved * self.nest.bits(name) / 8
        return self.nest.elements(name) * self.nest.bits(name) / 8 + 8 * (moved - self.nest.touched(name))

    def buffers(self, order: tuple[Name, ...]) -> list[list[tuple[float, float]]]:
        """Room and bytes by tensor, for each place in the order of the groups of loops that its buffer may have."""
        places = [tuple(d for group in order[:depth] for d in self.loops(group)) for depth in range(len(order) + 1)]
        return [[(self.room(n, out), self.bytes(n, self.moved(n, out))) for out in places] for n in NAMES]


def exhaustive(nest: Nest, size_bytes: float, dram_pj: float, sram_pj: float) -> float:
    """Least energy of the traffic that depends on the mapping."""

    def all_walks() -> Iterator[float]:
        sizes = (nest.b, nest.k, nest.c, *(v.out for v in nest.windows))
        for tiles in itertools.product(*(range(1, s + 1) for s in sizes)):
            walk = Walk(nest, tiles)
            inside = walk.bytes(nest.writes, walk.visits())
            for order in itertools.permutations(NAMES):
                for chosen in itertools.product(*walk.buffers(order)):
                    if sum(room for room, _ in chosen) <= size_bytes:
                        crossing = sum(moved for _, moved in chosen)
                        yield crossing * (dram_pj + sram_pj) + inside * sram_pj

    return min(all_walks())


@st.composite
def nests(draw: st.DrawFn, most: int = 4) -> Nest:
    windows = []
    for _ in range(draw(st.integers(0, 1))):
        kernel, stride, dilation = draw(
            st.sampled_from([(3, 1, 1), (3, 2, 1), (2, 1, 1), (2, 2, 1), (2, 1, 2), (1, 2, 1), (2, 3, 1)])
        )
        out, padding = draw(st.integers(2, most)), draw(st.integers(0, 1))
        windows.append(
            Window(
                out,
                kernel,
                stride,
                dilation,
                padding,
                max(1, (out - 1) * stride + (kernel - 1) * dilation + 1 - 2 * padding),
            )
        )
    b, k, c = (draw(st.integers(1, most + 2)) for _ in range(3))
    bits = (draw(st.sampled_from([4, 8, 16, 32])) for _ in range(3))
    return Nest(b, k, c, tuple(windows), 1, draw(st.sampled_from(NAMES)), *bits)


@settings(max_examples=40, deadline=None)
@given(nests(), st.floats(0.1, 0.8), st.sampled_from([(100.0, 1.0), (1.0, 1.0)]))
@example(Nest(1, 4, 6, (Window(4, 2, 1, 2, 0, 6),), 1, "x", 32, 4, 32), 0.5, (1.0, 1.0))
@example(Nest(1, 1, 1, (Window(2, 1, 2, 1, 1, 1),), 1, "x", 4, 4, 4), 0.5, (100.0, 1.0))
def test_equals_exhaustive_search_on_small_nests(nest: Nest, share: float, prices: tuple[float, float]) -> None:
    """With room for a share of the three tensors."""
    size_bytes = share * sum(nest.elements(n) * nest.bits(n) / 8 for n in NAMES)
    levels = (Level("sram", size_bytes, 1e9, prices[1]), Level("dram", 1e12, 1e9, prices[0]))
    found = map_nest(nest, levels, ARRAY, 1.0, ENERGY)
    whole = [v.kernel for v in nest.windows]
    if found is None or [v.kernel for v in found.tilings[0].tile.windows] != whole:
        return  # kernels are cut only where nothing else fits: outside of the space searched here
    dram_pj, sram_pj = prices
    operands = sum(nest.macs * nest.bits(n) / 8 for n in nest.reads)  # one element each for every MAC of one PE
    energy = off_chip(found) * dram_pj + (sum(found.traffic_bytes["sram"].values()) - operands) * sram_pj
    assert energy == pytest.approx(exhaustive(nest, size_bytes, dram_pj, sram_pj))


# -- lower bounds ------------------------------------------------------------------------------------------------------


@st.composite
def large_nests(draw: st.DrawFn) -> Nest:
    windows = []
    for _ in range(draw(st.sampled_from([0, 2]))):
        kernel, stride = draw(st.sampled_from([(1, 2), (3, 1), (3, 2), (5, 1), (7, 2)]))
        out, padding = draw(st.integers(1, 60)), kernel // 2
        windows.append(Window(out, kernel, stride, 1, padding, max(1, (out - 1) * stride + kernel - 2 * padding)))
    sizes = (draw(st.integers(1, 300)) for _ in range(3))
    bits = (draw(st.sampled_from([4, 8, 16, 32])) for _ in range(3))
    groups, writes = draw(st.integers(1, 3)), draw(st.sampled_from(NAMES))
    b, k, c = sizes
    return Nest(b, k, c, tuple(windows), groups, writes, *bits)


@settings(max_examples=60, deadline=None)
@given(large_nests(), st.integers(2000, 2_000_000))
def test_moves_at_least_the_compulsory_traffic_and_less_with_more_memory(nest: Nest, size_bytes: int) -> None:
    found = mapped(nest, size_bytes, sram_pj=0.0)
    assert off_chip(found) >= nest.compulsory_bytes * (1 - 1e-12)
    assert off_chip(mapped(nest, 2 * size_bytes, sram_pj=0.0)) <= off_chip(found) * (1 + 1e-12)
    enough = sum(nest.elements(n) for n in ("x", "w", "y")) * 8
    assert off_chip(mapped(nest, enough)) == pytest.approx(nest.compulsory_bytes)


@settings(max_examples=60, deadline=None)
@given(large_nests(), st.integers(2000, 200_000))
def test_moves_at_least_what_the_published_bounds_demand(nest: Nest, size_bytes: int) -> None:
    """Convolutions: 2 MACs / sqrt(R S) elements, with S elements of memory and each input used by at most R taps.

    Chen, Han, Wang, "Communication lower bound in convolution accelerators", HPCA 2020 (arXiv:1911.05662); for R = 1
    the bound of Hong and Kung (STOC 1981) with the constant of Smith et al. (arXiv:1702.02017), less 2 S.
    """
    words = size_bytes * 8 / min(nest.bits(n) for n in nest.reads)
    reuse = math.prod(math.ceil(v.kernel / v.stride) for v in nest.windows)
    bound = nest.g * (2 * nest.macs / nest.g / math.sqrt(reuse * words) - 2 * words)
    narrowest = min(nest.bits(n) for n in ("x", "w", "y"))
    assert off_chip(mapped(nest, size_bytes, sram_pj=0.0)) >= bound * narrowest / 8


def test_comes_near_the_bound_of_matrix_products() -> None:
    """Within a factor of two, of which double buffering (twice the room) takes the root of two."""
    nest, size_bytes = product(1024, 1024, 1024, (32, 32, 32)), 65536
    bound = 2 * nest.macs / math.sqrt(size_bytes / 4) * 4
    assert bound < off_chip(mapped(nest, size_bytes)) < 2 * bound


# -- by hand, and the rest ---------------------------------------------------------------------------------------------


def test_matrix_product_by_hand() -> None:
    """8x8 by 8x8 in fp32 with room for 27 elements.

    Tiles b x c of x, c x k of w and b x k of y, each twice: 2 (bc + ck + bk) <= 27. With 2x2 tiles of y and c = 2 it
    takes 24; x and w are read 8/2 times, y is written once: 4*64 + 4*64 + 64 elements.
    """
    found = mapped(product(8, 8, 8, (32, 32, 32)), 27 * 4, sram_pj=0.0)
    tile = found.tilings[0]
    assert off_chip(found) <= (4 * 64 + 4 * 64 + 64) * 4
    assert (tile.tile.b, tile.tile.k, tile.stay.tile) == (2, 2, "y") or off_chip(found) < 576 * 4


@settings(max_examples=40, deadline=None)
@given(large_nests(), st.integers(20_000, 200_000))
def test_a_tile_holds_what_the_array_works_on(nest: Nest, size_bytes: int) -> None:
    """Output channels in whole rounds of their axis, enough positions for the other, enough groups for both."""
    levels = (Level("sram", size_bytes, 1e9, 1), Level("dram", 1e12, 1e9, 100))
    found = map_nest(nest, levels, ArrayShape(8, 4, 32), 32.0, ENERGY)
    if found is None:
        return  # a kernel alone can be too large
    tile = found.tilings[0].tile
    in_use = found.utilisation * 8 * 4
    assert math.prod(tile.parallel) * tile.g >= min(in_use, math.prod(nest.parallel) * nest.g) * (1 - 1e-9)
    channels, held = nest.parallel[1], tile.parallel[1]
    assert held == channels or held % 8 == 0 or held % 4 == 0


def test_nothing_fits_into_a_memory_of_a_few_bytes() -> None:
    levels = (Level("sram", 20, 1, 1), Level("dram", 1e9, 1, 10))
    assert map_nest(product(4, 4, 4, (32, 32, 32)), levels, ARRAY, 1.0, ENERGY) is None
    tiny = FpgaCostModel(bench(memory__0__size_bytes=q(20)))
    assert "no tile" in getattr(tiny.cost(conv(1, 2, 2, 4)), "reason", "")


def test_a_kernel_is_cut_where_it_does_not_fit_whole() -> None:
    nest = Nest(1, 1, 1, (Window(4, 9, 1, 1, 4, 4),), 1, "y")
    assert mapped(nest, 50).tilings[0].tile.windows[0].kernel == 1


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60))
def test_three_memories_move_no_less_inside_than_outside(m: int, k: int, n: int) -> None:
    levels = (Level("l1", 200, 1e9, 1), Level("l2", 4000, 1e9, 5), Level("dram", 1e12, 1e9, 100))
    found = map_nest(product(m, k, n, (32, 32, 32)), levels, ArrayShape(2, 2, 32), 4.0, ENERGY)
    assert found is not None
    outer, middle, inner = (sum(found.traffic_bytes[name].values()) for name in ("dram", "l2", "l1"))
    assert inner * (1 + 1e-9) >= middle - outer >= outer * (1 - 1e-9)


def test_latency_is_never_worse_when_asked_for() -> None:
    board = bench(memory__1__bandwidth_gb_per_s=q(20))
    quick, frugal = (FpgaCostModel(board, objective=o) for o in OBJECTIVES)
    for op in (conv(2, 16, 24, 12), conv(1, 64, 64, 7), conv(4, 3, 16, 16, 5)):
        fast, cheap = priced(quick.cost(op)), priced(frugal.cost(op))
        assert fast.time_s <= cheap.time_s * (1 + 1e-12)
        assert sum(cheap.energy_j.values()) <= sum(fast.energy_j.values()) * (1 + 1e-12)


def test_traffic_by_operand_adds_up() -> None:
    cost = priced(FpgaCostModel("zedboard").cost(conv(8, 64, 64, 56)))
    assert {level: sum(parts.values()) for level, parts in cost.operand_bytes.items()} == pytest.approx(
        cost.traffic_bytes
    )
    assert set(cost.operand_bytes["ddr3"]) == {"x", "w", "y"}


def test_fused_products_by_hand() -> None:
    """Operands of 1000 and 600 B, a result of 400 B, tiles of 200 B."""
    attention = Product(1, T(250), T(150), T(100))
    assert map_product(attention, 400, 32).total_bytes == 3 * 1000 + 600 + 400 + 2 * 2 * 400  # the second kept
    assert map_product(attention, 1200, 32).total_bytes == 1000 + 600 + 400
    batched = Product(1, T(2, 250), T(2, 150), T(2, 100), 2)
    assert map_product(batched, 400, 32).total_bytes == 2 * map_product(attention, 400, 32).total_bytes
