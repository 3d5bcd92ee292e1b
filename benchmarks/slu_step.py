"""Time and memory of a training step with SLU beside the plain one, random gates at 0 to 80 %.

    python -m benchmarks.slu_step --models resnet20,resnet74,vit --out runs/slu_step.json
    python -m benchmarks.slu_step --out runs/slu_step.json --table

A step is forward, backward and SGD with momentum on a batch of 128 images of 32x32. Plain eager PyTorch and every ratio
take turns in random order within one process, so that whatever else the machine does meets all of them; a ratio's time
is the median over rounds of its time in a round divided by the plain step's in the same round. ``--clock cpu`` counts
the process's CPU time instead of the wall's, which other processes disturb less. ``gates`` is the step with learned
gates that are held open minus the one with open gates that do not decide. Freed memory stays with the process: glibc
would give some of it back, and the variant that needs it next would pay for the pages. Memory is the peak resident set
of a process of its own that does three steps, less what it held before. ``--out`` is written after every model; a call
adds to it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import e2pass
from e2pass.report import save

BATCH = 128
RATIOS = (0.0, 0.2, 0.4, 0.6, 0.8)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


class ViT(nn.Module):
    """A small pre-norm vision transformer: 4x4 patches, six layers of width 192 with three heads."""

    def __init__(self, width: int = 192, depth: int = 6, heads: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.position = nn.Parameter(0.02 * torch.randn(64, width))
        layers = [
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(depth)
        ]
        self.layers = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        out: Tensor = self.head(self.norm(self.layers(tokens)).mean(1))
        return out


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet20": lambda: e2pass.models.resnet(20),
    "resnet74": lambda: e2pass.models.resnet(74),
    "vit": ViT,
}
VARIANTS = ("plain", *(f"random {ratio:.0%}" for ratio in RATIOS), "open", "learned, open")


def make_step(model: str, variant: str) -> Callable[[], None]:
    """One training step as a function."""
    torch.manual_seed(0)
    net = MODELS[model]()
    x, y = torch.randn(BATCH, 3, 32, 32), torch.randint(0, 10, (BATCH,))
    if variant != "plain":
        kind, _, ratio = variant.partition(" ")
        # The controller never closes a gate whose target is to skip nothing and whose price is at its bound.
        gate = "learned" if kind == "learned," else kind
        skip = float(ratio.rstrip("%")) / 100 if kind == "random" else 0.0
        config = e2pass.Config(smd=None, slu=e2pass.SLU(gate=gate, skip=skip), psg=None, bits=None)
        t = e2pass.transform(net, x[:2], config=config)
        net = t.model
        if kind == "learned,":
            assert t.model.e2_slu is not None
            t.model.e2_slu.price.fill_(-8.0)
            t.model.e2_slu.GAIN, t.model.e2_slu.LIMIT = 0.0, 8.0
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(net(x), y).backward()
        optimizer.step()

    return step


def keep_freed_memory() -> None:
    """Tell glibc to reuse freed memory rather than to give it back; does nothing elsewhere."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(M_TRIM_THRESHOLD, 2**30)
    mallopt(M_MMAP_THRESHOLD, 2**25)  # the largest that it accepts


def measure_times(model: str, rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each variant's step, round by round."""
    keep_freed_memory()
    steps = {variant: make_step(model, variant) for variant in VARIANTS}
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    order = random.Random(0)
    for _ in range(rounds):
        for variant in order.sample(VARIANTS, len(VARIANTS)):  # nobody always follows the same one
            started = clock()
            steps[variant]()
            seconds[variant].append(clock() - started)
    return seconds


def peak_memory(model: str, variant: str) -> float:
    """Peak growth of the resident set over three steps, MiB, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_memory, (model, variant, torch.get_num_threads()))


def _peak_memory(model: str, variant: str, threads: int) -> float:
    torch.set_num_threads(threads)
    step = make_step(model, variant)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is counted from here
    before = _resident("VmRSS")
    for _ in range(3):
        step()
    return _resident("VmHWM") - before


def _resident(key: str) -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(key + ":"))) / 2**10


def measure(model: str, rounds: int, clock: str) -> dict[str, Any]:
    seconds = measure_times(model, rounds, CLOCKS[clock])
    plain = seconds["plain"]
    result: dict[str, Any] = {
        "clock": clock,
        "rounds": rounds,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads of {os.cpu_count()}",
        "torch": torch.__version__,
        "plain_s": statistics.median(plain),
        "relative": {v: statistics.median(a / b for a, b in zip(seconds[v], plain, strict=True)) for v in VARIANTS[1:]},
        "memory_mib": {v: peak_memory(model, v) for v in VARIANTS[:6]},
    }
    learned, opened = seconds["learned, open"], seconds["open"]
    parts = [(a - b) / c for a, b, c in zip(learned, opened, plain, strict=True)]
    result["gates"] = statistics.median(parts)
    return result


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    head = ["model", "plain step", *(f"{ratio:.0%}".replace("%", " %") for ratio in RATIOS), "gates' own time"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for model, r in results.items():
        cells = [f"{r['relative'][f'random {ratio:.0%}']:.2f}" for ratio in RATIOS]
        lines.append(f"| {model} | {1e3 * r['plain_s']:.0f} ms | {' | '.join(cells)} | {r['gates']:.1%} |")
        memory = r["memory_mib"]
        cells = [f"{memory[f'random {ratio:.0%}']:.0f}" for ratio in RATIOS]
        lines.append(f"| {model}, MiB | {memory['plain']:.0f} | {' | '.join(cells)} | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", default="", help=f"some of {','.join(MODELS)}")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true", help="print the table of the results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    for model in filter(None, options.models.split(",")):
        results[model] = measure(model, options.rounds, options.clock)
        save(json.dumps(results, indent=1) + "\n", options.out)
    if options.table:
        print(table(results))


if __name__ == "__main__":
    main()
