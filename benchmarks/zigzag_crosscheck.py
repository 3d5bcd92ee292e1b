"""The mapper beside ZigZag on the same board, over the convolutions of ResNet-20 and -18: writes ``docs/zigzag.md``.

    pip install 'e2pass[crosscheck]'
    python -m benchmarks.zigzag_crosscheck            # goes on where it was stopped; state in out/zigzag.jsonl
    python -m benchmarks.zigzag_crosscheck --only ResNet-20 --effort 3

ZigZag (MIT, KU Leuven) searches loop orders and tile sizes. Both tools get the same loop nests (forward, dX and dW) and
memories (double buffered on the chip) and the same spread over the array, and are asked for least energy. Compared are
MACs, off-chip bytes, and the energy of all memories above the registers. ZigZag cannot express the input gradient of a
strided convolution, whose output would be the sliding operand: both get it as the dense convolutions of its sub-grids
(one for each offset within the stride), which take the same MACs in all.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import product
from pathlib import Path
from unittest.mock import patch

import numpy as np
import numpy.typing as npt

from benchmarks.zigzag_side import Result, orderings, zigzag
from e2pass.backends.fpga import FpgaCostModel, tilings
from e2pass.backends.fpga.mapper import ArrayShape, _spread, map_nest
from e2pass.backends.fpga.nest import Name, Nest, Window, _moved
from e2pass.report import save

HERE = Path(__file__).resolve().parent
STATE = HERE.parent / "out" / "zigzag.jsonl"
TABLE = HERE.parent / "docs" / "zigzag.md"
BATCH = 12
"""Fills the 12 columns of the ZedBoard's array: ZigZag unrolls whole loops only."""
BITS: dict[Name, tuple[int, int, int]] = {"y": (8, 8, 32), "x": (32, 8, 16), "w": (8, 32, 16)}
"""Widths of x, w and y by the tensor written: 8-bit activations and weights, 16-bit gradients, results of 32 bits."""
PHASES: dict[Name, str] = {"y": "forward", "x": "dX", "w": "dW"}


@dataclass(frozen=True)
class Conv:
    """A square convolution of a network: channels, output size, kernel, stride, and how often it occurs."""

    name: str
    c: int
    k: int
    out: int
    kernel: int = 3
    stride: int = 1
    first: bool = False

    @property
    def padding(self) -> int:
        return self.kernel // 2


def resnet20() -> list[Conv]:
    found = [Conv("conv", 3, 16, 32, first=True)] + [Conv("stage1", 16, 16, 32)] * 6
    for stage, (c, k, out) in enumerate([(16, 32, 16), (32, 64, 8)], 2):
        found += [Conv(f"stage{stage} down", c, k, out, 3, 2), Conv(f"stage{stage} 1x1", c, k, out, 1, 2)]
        found += [Conv(f"stage{stage}", k, k, out)] * 5
    return found


def resnet18() -> list[Conv]:
    found = [Conv("conv1", 3, 64, 112, 7, 2, True)] + [Conv("layer1", 64, 64, 56)] * 4
    for stage, (c, k, out) in enumerate([(64, 128, 28), (128, 256, 14), (256, 512, 7)], 2):
        found += [Conv(f"layer{stage} down", c, k, out, 3, 2), Conv(f"layer{stage} 1x1", c, k, out, 1, 2)]
        found += [Conv(f"layer{stage}", k, k, out)] * 3
    return found


NETWORKS = {"ResNet-20": resnet20, "ResNet-18": resnet18}


def nests(conv: Conv, writes: Name) -> list[Nest]:
    """The nests of a phase; more than one for the input gradient of a strided convolution."""
    x, w, y = BITS[writes]
    if writes != "x":
        window = Window(conv.out, conv.kernel, conv.stride, 1, conv.padding, conv.out * conv.stride)
        return [Nest(BATCH, conv.k, conv.c, (window, window), 1, writes, x, w, y)]
    # gX at offset (i, j) within the stride is a dense convolution of gY with the taps that reach it.
    taps = [len([f for f in range(conv.kernel) if (f - conv.padding) % conv.stride == i]) for i in range(conv.stride)]
    found = []
    for rows, columns in product(taps, taps):
        if rows and columns:
            windows = tuple(Window(conv.out, t, 1, 1, t // 2, conv.out) for t in (rows, columns))
            found.append(Nest(BATCH, conv.c, conv.k, windows, 1, "y", y, w, x))
    return found


# -- ours ----------------------------------------------------------------------------------------------------------


def divisors(size: int) -> npt.NDArray[np.int64]:
    """Tile sizes that leave no remainder, ascending."""
    return np.array([tile for tile in range(1, size + 1) if size % tile == 0], dtype=np.int64)


def ours_alike(model: FpgaCostModel, nest: Nest) -> tuple[Result, Nest]:
    """Ours with the freedom that ZigZag has: loops are cut into whole factors, and the batch is in every tile.

    ZigZag spreads the columns of the array over the batch; ours may cut it, since positions fill the columns as well.
    Here it may not: the samples are one element of so many times the width, on an array of one column.
    """
    array, samples = model._shape, nest.b
    if nest.writes == "y":
        nest = replace(nest, b=1, x_bits=samples * nest.x_bits, y_bits=samples * nest.y_bits)
        array = ArrayShape(array.rows, 1, samples * array.accumulator_bits)
    with patch.object(tilings, "_splits", divisors):
        found, tile = ours(model, nest, array)
    return replace(found, macs=found.macs * samples / nest.b), tile


def ours(model: FpgaCostModel, nest: Nest, array: ArrayShape | None = None) -> tuple[Result, Nest]:
    """Map a nest for least energy of the memories; the tile beside it."""
    goal = model._goal._replace(fixed_pj_per_cycle=0.0)
    taken = []
    for _ in range(3):
        for cache in (map_nest, _spread, _moved):
            cache.cache_clear()
        started = time.process_time()
        mapped = map_nest(nest, model._levels, array or model._shape, 1.0, goal)
        taken.append(time.process_time() - started)
    assert mapped is not None
    moved = {level: sum(parts.values()) for level, parts in mapped.traffic_bytes.items()}
    memory_pj = sum(moved[level.name] * level.pj_per_byte for level in model._levels)
    return Result(nest.macs, moved[model.dram], memory_pj, statistics.median(taken)), mapped.tilings[-1].tile


# -- comparison ----------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One phase of one convolution.

    ``alike`` is ours with ZigZag's freedom, and ``best`` ZigZag's price of the better of what its search and what that
    mapping of ours found.
    """

    network: str
    conv: str
    phase: str
    times: int
    ours: Result
    alike: Result
    zigzag: Result
    best: Result
    fits: bool

    @property
    def energy(self) -> float:
        return self.alike.memory_pj / self.best.memory_pj - 1

    @property
    def gain(self) -> float:
        return self.ours.memory_pj / self.zigzag.memory_pj - 1


def measured(path: Path) -> dict[tuple[str, str, str], Result]:
    """What ZigZag has said so far."""
    if not path.exists():
        return {}
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {(e["network"], e["conv"], e["phase"]): Result(**e["zigzag"]) for e in entries}


def compare(model: FpgaCostModel, network: str, conv: Conv, times: int, writes: Name, theirs: Result) -> Row:
    mine, alike, tiled, fits = Result(), Result(), Result(), True
    for nest in nests(conv, writes):
        found, _ = ours(model, nest)
        same, tile = ours_alike(model, nest)
        mine, alike = mine.plus(found), alike.plus(same)
        priced = [zigzag(model.board, nest, 1, order) for order in orderings(nest, tile, model.board)]
        tiled = tiled.plus(min(priced, key=lambda result: result.memory_pj))
        fits = fits and math.isclose(same.off_chip_bytes, nest.compulsory_bytes)
    best = min((theirs, tiled), key=lambda result: result.memory_pj)
    return Row(network, conv.name, PHASES[writes], times, mine, alike, theirs, best, fits)


def rows(model: FpgaCostModel, only: str | None, effort: int, at_most: int) -> Iterator[Row]:
    """Compare every convolution; what ZigZag says is kept as soon as it is known."""
    done = measured(STATE)
    STATE.parent.mkdir(exist_ok=True)
    for network, build in NETWORKS.items():
        if only not in (None, network):
            continue
        for conv, times in Counter(build()).items():
            for writes in PHASES:
                if writes == "x" and conv.first:
                    continue  # nothing before the first layer wants a gradient
                key = (network, conv.name, PHASES[writes])
                if key not in done and at_most == 0:
                    raise SystemExit("stopped after --at-most lines; the state is kept")
                if key not in done:
                    at_most -= 1
                    done[key] = Result()
                    for nest in nests(conv, writes):
                        done[key] = done[key].plus(zigzag(model.board, nest, effort))
                    entry = dict(zip(("network", "conv", "phase"), key, strict=True), zigzag=asdict(done[key]))
                    with STATE.open("a", encoding="utf-8") as state:
                        state.write(json.dumps(entry) + "\n")
                    print(*key, f"{done[key].seconds:.1f} s", flush=True)
                yield compare(model, network, conv, times, writes, done[key])


def page(found: list[Row], effort: int, *, timed: bool) -> str:
    """Counts first, then a line for each phase of each convolution."""
    fit = [r for r in found if r.fits]
    close = [r for r in found if abs(r.energy) <= 0.15]
    far = [abs(r.energy) for r in found]
    equal = sum(r.ours.macs == r.zigzag.macs for r in found)
    same = sum(math.isclose(r.alike.off_chip_bytes, r.best.off_chip_bytes, rel_tol=1e-6) for r in fit)
    faster = [r.zigzag.seconds / r.ours.seconds for r in found]
    ratio = sum(r.zigzag.seconds for r in found) / sum(r.ours.seconds for r in found)
    times = f"- CPU time: the mapper is {min(faster):.0f} times faster at the least, {ratio:,.0f} times over all."
    better = sum(r.best.memory_pj < r.zigzag.memory_pj * 0.99 for r in found)
    intro = f"""
        # The mapper beside ZigZag

        Written by `python -m benchmarks.zigzag_crosscheck` (ZigZag {version("zigzag-dse")}, `lpf_limit` {effort});
        modelled on both sides. The ZedBoard, batch {BATCH}, every different convolution of ResNet-20 (32x32) and
        ResNet-18 (224x224): forward, dX and dW, 8-bit activations and weights, 16-bit gradients, 32-bit results.

        - MACs: equal in {equal} of {len(found)} lines.
        - Off-chip traffic, with the same freedom: equal in {same} of the {len(fit)} lines where everything moves once.
        - Energy of the memories above the registers, with the same freedom: within 15 % in {len(close)} of
          {len(found)} lines, at most {max(far):.1%} apart.
        - Energy of our mapping beside that of ZigZag's own search: from {min(r.gain for r in found):+.1%} to
          {max(r.gain for r in found):+.1%}.
        {times if timed else "- CPU time: not measured in this run."}

        *Same freedom*: ours with whole factors of the loops as tile sizes and the whole batch in every tile, because
        ZigZag cuts loops into factors and spreads the columns of the array over the batch; ZigZag's price of the
        cheaper of two mappings, the one its search found and that one of ours, handed over as a loop order. Both keep
        room for double buffering (`force_double_buffering`). ZigZag's search merges the factors of all loops down to
        `lpf_limit`, or one for each loop, too few to cut a large convolution well: in {better} lines ZigZag itself
        prices our mapping more than 1 % below the one that its search found, by up to
        {1 - min(r.best.memory_pj / r.zigzag.memory_pj for r in found):.0%}.

        *Ours*: the mapper as it is, beside ZigZag's search. Its tiles may have any size, a last smaller one is priced
        as what it is, and it may cut the batch, since positions fill the columns as well.

        The spread over the array is as equal as whole factors allow: in the dW of a 1x1 convolution ZigZag fills 8 of
        the 12 columns with input channels, where ours fills 12 in all rounds but the last and shares operands better.

        The dX of a strided convolution is compared as the dense convolutions of its sub-grids: ZigZag cannot let the
        output slide. Modelled time is not compared.
"""
    header = "network | convolution | phase | times | MACs | MB off chip, ours | same freedom | ZigZag | "
    header += "energy, same freedom | ours" + " | faster" * timed
    lines = [line[8:] for line in intro.splitlines()[1:]]
    lines += ["", f"| {header} |", "|---|---|---|---:|---|" + "---:|" * (5 + timed)]
    for r, times_faster in zip(found, faster, strict=True):
        cells = [
            r.network, r.conv, r.phase, str(r.times), "equal" if r.ours.macs == r.zigzag.macs else "**differ**",
            *(f"{result.off_chip_bytes / 1e6:.3f}" for result in (r.ours, r.alike, r.zigzag)),
            f"{r.energy:+.2%}", f"{r.gain:+.2%}", *([f"{times_faster:,.0f}"] if timed else []),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(NETWORKS))
    parser.add_argument(
        "--effort", type=int, default=4, help="ZigZag's lpf_limit: into how many factors loops are split"
    )
    parser.add_argument("--untimed", action="store_true", help="leave CPU times out, for a machine that is busy")
    parser.add_argument("--at-most", type=int, default=-1, help="measure so many lines, then stop")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    found = list(rows(FpgaCostModel("zedboard"), options.only, options.effort, options.at_most))
    if options.only is None:
        save(page(found, options.effort, timed=not options.untimed), TABLE)


if __name__ == "__main__":
    main()
