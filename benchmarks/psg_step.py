"""Step time and peak memory of PSG beside plain eager PyTorch, interleaved in one run.

    python -m benchmarks.psg_step --depths 20 74 --steps 7 --out step.json

Time: each round runs one step of every variant after the other, so that a load on the machine hits all alike; reported
are the median over rounds of each variant and of its ratio to plain eager in the same round. The clock is the CPU time
of the process (all threads) or, with ``--clock wall``, the wall clock.

Memory: the largest sum of tensor memory alive at once within a step, from the allocation events of torch.profiler;
parameters and the batch, alive before, are not part of it.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import e2pass
from e2pass.models import resnet
from e2pass.report import save

Step = Callable[[], None]
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}


def step_of(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        functional.cross_entropy(model(x), y).backward()

    return step


def variants(depth: int, batch: int, compiled: bool) -> dict[str, Step]:
    torch.manual_seed(0)
    model = resnet(depth)
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))
    last: Any = copy.deepcopy(model)
    last.to(memory_format=torch.channels_last)
    steps = {
        "eager": step_of(model, x, y),
        "eager, channels last": step_of(last, x.contiguous(memory_format=torch.channels_last), y),
    }
    silent = e2pass.PSG()
    configs = {
        "8 bits": e2pass.Config(smd=None, slu=None, psg=None),
        "psg": e2pass.Config(smd=None, slu=None, psg=silent),
        "psg, fp32 norm inputs": e2pass.Config(smd=None, slu=None, psg=silent, bits=e2pass.Bits(norm_saved=None)),
        "psg, bit-true": e2pass.Config(smd=None, slu=None, psg=silent, bits=e2pass.Bits(bit_true=True)),
        "psg, counting": e2pass.Config(smd=None, slu=None, psg=e2pass.PSG(stats=True)),
        "psg, counting, bound": e2pass.Config(smd=None, slu=None, psg=e2pass.PSG(stats=True, bound=True)),
    }
    if compiled:
        configs["psg, compiled"] = e2pass.Config(smd=None, slu=None, psg=silent, compile=True)
    for name, config in configs.items():
        steps[name] = step_of(e2pass.transform(model, x[:2], config=config).model.train(), x, y)
    return steps


def times(steps: dict[str, Step], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 2):  # two to warm up: lowering, allocator, oneDNN's primitives
        for name, step in steps.items():
            start = clock()
            step()
            if i >= 2:
                found[name].append(clock() - start)
    return found


def peak_mb(step: Step) -> float:
    """Megabytes (1e6 bytes) of tensors alive at once within a step, beyond what was alive before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    alive = peak = 0
    events: Any = profile.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[20, 74])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {"torch": torch.__version__, "threads": args.threads, "batch": args.batch}
    for depth in args.depths:
        steps = variants(depth, args.batch, args.compile)
        measured = times(steps, args.steps, CLOCKS[args.clock])
        memory = {name: peak_mb(step) for name, step in steps.items()}
        rows = {}
        print(f"ResNet-{depth}, batch {args.batch}, {args.threads} threads, {args.clock} time")
        for name, seconds in measured.items():
            ratios = [own / eager for own, eager in zip(seconds, measured["eager"], strict=True)]
            rows[name] = {
                "time_s": statistics.median(seconds),
                "time_ratio": statistics.median(ratios),
                "peak_mb": memory[name],
                "peak_ratio": memory[name] / memory["eager"],
            }
            row = rows[name]
            print(
                f"  {name:24} {row['time_s']:7.3f} s  x{row['time_ratio']:.2f}"
                f"   peak {row['peak_mb']:8.1f} MB  x{row['peak_ratio']:.2f}"
            )
        results[f"resnet{depth}"] = rows
        if args.out is not None:
            save(json.dumps(results, indent=1), args.out)


if __name__ == "__main__":
    main()
