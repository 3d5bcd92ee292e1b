"""How long a price takes, what the gates add, and what the board's estimates decide: writes ``docs/pricing.md``.

    python -m benchmarks.pricing                    # goes on where it was stopped; state in out/pricing.json
    python -m benchmarks.pricing --depths 20,110    # without ResNet-1202, which takes minutes to lower

Timed is the price of every operation of a plain step on a new cost model with empty caches, after capture and lowering:
the median of seven runs; and capture and lowering themselves, once. CPU time. The sensitivity changes one number of the
ZedBoard at a time, for ResNet-74 in fp32 and with integer products.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import e2pass
from e2pass.api import _program
from e2pass.backends.fpga import Board, FpgaCostModel, load_board
from e2pass.backends.fpga.mapper import _spread, map_nest
from e2pass.backends.fpga.nest import _moved
from e2pass.config import resolve
from e2pass.cost import OpSite, Phase, Technique, TensorSpec
from e2pass.models import resnet
from e2pass.passes.find_residual_blocks import FindResidualBlocks
from e2pass.passes.lower import Lower
from e2pass.passes.manager import PassManager
from e2pass.passes.outline import Outline
from e2pass.passes.price import Price
from e2pass.report import save
from e2pass.step.cost import price_step
from e2pass.step.training_step import TrainingStep

ROOT = Path(__file__).resolve().parent.parent
STATE = ROOT / "out" / "pricing.json"
TABLE = ROOT / "docs" / "pricing.md"


def timed_sites(depth: int, batch: int) -> tuple[list[OpSite], float]:
    """Operations of a ResNet's baseline step; CPU seconds to build, capture and lower it."""
    started = time.process_time()
    step = sites(depth, batch)
    return step, time.process_time() - started


def sites(depth: int, batch: int) -> list[OpSite]:
    """Operations of a ResNet's baseline step."""
    config = resolve("neutral").model_copy(update={"slu": None})
    program = _program(resnet(depth), torch.randn(batch, 3, 32, 32), config, inplace=True)
    step = TrainingStep(FpgaCostModel("zedboard"))
    PassManager([FindResidualBlocks(), Outline(), Lower(), Price(step)]).run(program)
    return [node.site for node in program.step.plain if node.site.technique is Technique.BASE]


def seconds(step: list[OpSite], repeats: int = 7) -> float:
    """Median CPU time to price a step from nothing."""
    gc.collect()  # the graphs that the step was lowered from
    taken = []
    for _ in range(repeats):
        for cache in (map_nest, _spread, _moved):
            cache.cache_clear()
        started = time.process_time()
        price_step(step, FpgaCostModel("zedboard"))
        taken.append(time.process_time() - started)
    return statistics.median(taken)


def gate_share() -> float:
    """MACs of the gates of a neutral ResNet-74 by those of its plain step."""
    report = e2pass.transform(resnet(74), torch.randn(4, 3, 32, 32), config="neutral").report()
    assert report.transformed is not None
    return report.transformed.by_technique()["slu"].macs / report.baseline.macs


# -- sensitivity ---------------------------------------------------------------------------------------------------


def integers(site: OpSite) -> OpSite:
    """The same product on 8-bit activations and weights and 16-bit gradients; results stay at 32 bits."""
    packet = site.op.split(".")[1]
    gradient = site.phase in (Phase.DX, Phase.DW)
    operands = {
        "convolution": (8, 8), "convolution_backward": (16, 8, 8), "addmm": (32, 8, 8),
        "mm": (16, 8) if gradient else (8, 8),
    }.get(packet)  # fmt: skip
    if operands is None or site.op.startswith("optimizer."):
        return site
    specs = iter(operands)
    args = tuple(replace(a, bits=next(specs, a.bits)) if isinstance(a, TensorSpec) else a for a in site.args)
    return replace(site, args=args)


def changed(**values: float) -> Board:
    """The ZedBoard with other numbers; keys are paths such as ``power__static_w``."""
    data = load_board("zedboard").model_dump(by_alias=True)
    for path, value in values.items():
        place: Any = data
        for key in path.split("__"):
            place = place[int(key)] if key.isdigit() else place[key]
        place["value"] = value
    return Board.model_validate(data)


def changes() -> dict[str, dict[str, float]]:
    """What is changed, by its description."""
    board = load_board("zedboard")
    energies = {
        f"array__macs__{i}__energy_pj_per_mac": 10 * m.energy_pj_per_mac.value for i, m in enumerate(board.array.macs)
    }
    fp32 = next(i for i, m in enumerate(board.array.macs) if m.operand_bits == [32, 32])
    return {
        "none": {},
        "three DSP slices per fp32 MAC instead of five": {f"array__macs__{fp32}__macs_per_cycle": 64.0},
        "clock 150 MHz (BRAM with it)": {
            "clock_mhz": 150.0, "memory__0__transfers_mt_per_s": 150.0, "memory__0__bandwidth_gb_per_s": 168.0,
        },
        "processor power 1.0 W": {"power__processing_system_w": 1.0},
        "DDR at its peak of 4.264 GB/s": {"memory__1__bandwidth_gb_per_s": 4.264},
        "half of the BRAM": {"memory__0__size_bytes": 286720.0},
        "ten times the energy per MAC": energies,
    }  # fmt: skip


def sensitivity(batch: int) -> list[list[Any]]:
    """Change, joules of the fp32 step, of the integer step, seconds of both."""
    plain = sites(74, batch)
    coded = [integers(site) for site in plain]
    found = []
    for name, values in changes().items():
        model = FpgaCostModel(changed(**values))
        steps = [price_step(step, model) for step in (plain, coded)]
        found.append([name, *(s.energy_j for s in steps), *(s.time_s for s in steps)])
    return found


# -- the page ------------------------------------------------------------------------------------------------------


def page(done: dict[str, Any], batch: int) -> str:
    timed = [
        f"| ResNet-{depth} | {count:,} | {lowered:.1f} | {taken:.3f} | {1e6 * taken / count:.0f} |"
        for depth, count, lowered, taken in sorted(done["time"])
    ]
    moved = [
        f"| {name} | {fp32:.1f} J | {coded:.1f} J | {1 - coded / fp32:.0%} |" for name, fp32, coded, *_ in done["board"]
    ]
    _, _, joules, _, taken = done["board"][0]
    return f"""# Pricing: how long it takes, what gates add, what the estimates decide

Written by `python -m benchmarks.pricing` (torch {torch.__version__}, one core). Everything but the times is modelled.

Priced are all operations of the plain training step on the ZedBoard, batch {batch}, after capture and lowering, with
empty caches: the median of seven runs. Capture and lowering are timed once. All in seconds of CPU time. Each shape is
mapped once, so the time per operation falls with depth.

| network | operations | capture and lowering | price | microseconds per operation |
|---|---:|---:|---:|---:|
{chr(10).join(timed)}

The gates of a neutral ResNet-74 take {done["gates"]:.4%} of the MACs of its plain step; they stand on lines of their
own (`technique` *slu*).

ResNet-74, batch {batch}, one step; the integer step has 8-bit activations and weights and 16-bit gradients in all
products, fp32 elsewhere, and no quantizers. It draws {joules / taken:.2f} W on average; 64,000 such steps take
{64 * joules:.0f} kJ in {64_000 * taken / 3600:.0f} hours. One number of `zedboard.yaml` is changed at a time:

| change | fp32 step | integer step | saving |
|---|---:|---:|---:|
{chr(10).join(moved)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", default="20,110,218,434,1202", help="depths of CIFAR ResNets")
    parser.add_argument("--batch", type=int, default=128)
    options = parser.parse_args()
    done: dict[str, Any] = json.loads(STATE.read_text(encoding="utf-8")) if STATE.exists() else {"time": []}

    def keep() -> None:
        STATE.parent.mkdir(exist_ok=True)
        save(json.dumps(done), STATE)
        print(json.dumps(done), flush=True)

    if "board" not in done:
        done["board"] = sensitivity(options.batch)
        keep()
    if "gates" not in done:
        done["gates"] = gate_share()
        keep()
    for depth in (int(part) for part in options.depths.split(",")):
        if depth not in [entry[0] for entry in done["time"]]:
            step, lowered = timed_sites(depth, options.batch)
            done["time"].append([depth, len(step), lowered, seconds(step)])
            keep()
    save(page(done, options.batch), TABLE)


if __name__ == "__main__":
    main()
