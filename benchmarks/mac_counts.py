"""MACs of the analyzer beside torch's FlopCounterMode, over shipped, pytorchcv and transformers models.

    python -m benchmarks.mac_counts                 # writes docs/macs.md; goes on where it was stopped
    python -m benchmarks.mac_counts --only resnet20 --again

State in out/mac_counts.jsonl. Every model is run once, forward and backward, with each product of matrices and each
convolution counted by torch's own formulas as it is dispatched; and priced by ``e2pass.analyze``, which never runs it.
Attention is decomposed on both sides (``sdpa_kernel(MATH)``). torch counts the weight gradient of a grouped convolution
``groups`` times too high: there its closed form, N * positions * weight elements, takes the place of torch's formula.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import e2pass
import e2pass.models
from benchmarks import transformer_models
from e2pass.cost import Phase
from e2pass.report import save
from e2pass.step.cost import StepCost

HERE = Path(__file__).resolve().parent
STATE = HERE.parent / "out" / "mac_counts.jsonl"
TABLE = HERE.parent / "docs" / "macs.md"
PYTORCHCV = """
    resnet_cifar.resnet20_cifar10 preresnet_cifar.preresnet20_cifar10 seresnet_cifar.seresnet20_cifar10
    resnext_cifar.resnext20_16x4d_cifar10 pyramidnet_cifar.pyramidnet110_a48_cifar10
    densenet_cifar.densenet40_k12_bc_cifar10 xdensenet_cifar.xdensenet40_2_k24_bc_cifar10 nin_cifar.nin_cifar10
    shakeshakeresnet_cifar.shakeshakeresnet20_2x16d_cifar10 ror_cifar.ror3_56_cifar10
""".split()  # noqa: SIM905
EXPLAINED = {
    "transformers Wav2Vec2Model": "while training the model asks for the gradient of its own input, which is not used: "
    "the dX of its first convolution",
}
MATRIX = {"mm", "addmm", "bmm", "baddbmm"}
KINDS = ("forward convolution", "dX convolution", "dW convolution", "forward product", "backward product")


class Dispatched(TorchDispatchMode):
    """Adds up MACs of the operations that torch dispatches, by torch's formulas."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs: Counter[str] = Counter()
        self.half = "forward"
        self.grouped = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet is torch.ops.aten.convolution:
            formula = flop_counter.flop_registry[packet]
            self.macs["forward convolution"] += formula(*args, **(kwargs or {}), out_val=out) // 2
        elif packet is torch.ops.aten.convolution_backward:
            self._backward(args)
        elif packet.__name__ in MATRIX:
            formula = flop_counter.flop_registry[packet]
            self.macs[f"{self.half} product"] += formula(*args, **(kwargs or {}), out_val=out) // 2
        return out

    def _backward(self, args: tuple[Any, ...]) -> None:
        gy, x, w, _, stride, padding, dilation, transposed, output_padding, groups, mask = args
        formula = flop_counter.flop_registry[torch.ops.aten.convolution_backward]
        geometry = (None, stride, padding, dilation, transposed, output_padding, groups)
        for index, name in enumerate(("dX", "dW")):
            if not mask[index]:
                continue
            if name == "dW" and groups > 1:
                self.grouped = True
                positions = (x if transposed else gy).shape[2:]
                self.macs["dW convolution"] += x.shape[0] * math.prod(positions) * w.numel()
                continue
            one = [i == index for i in range(3)]
            out = (x if one[0] else None, w if one[1] else None, None)
            self.macs[f"{name} convolution"] += formula(gy, x, w, *geometry, one, out_val=out) // 2


def torch_counts(model: nn.Module, inputs: Any) -> Dispatched:
    """Run a model forward and backward, from the sum of its floating outputs."""
    counted = Dispatched()
    with sdpa_kernel(SDPBackend.MATH), counted:
        output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
        loss = sum(t.sum() for t in _tensors(output) if t.requires_grad)
        counted.half = "backward"
        loss.backward()  # type: ignore[union-attr]
    return counted


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    found = output.to_tuple() if hasattr(output, "to_tuple") else output
    return (t for t in tree_leaves(found) if isinstance(t, torch.Tensor))


def analyzed_counts(step: StepCost) -> Counter[str]:
    """MACs of the priced rows by kind; the loss and the update multiply nothing on the array."""
    macs: Counter[str] = Counter()
    for row in step.rows:
        if not row.macs:
            continue
        packet = row.op.split(".")[1]
        backward = row.phase not in (Phase.FORWARD, Phase.LOSS)
        if packet == "convolution":
            macs["forward convolution"] += int(row.macs)
        elif packet == "convolution_backward":
            macs[f"{'dX' if row.phase is Phase.DX else 'dW'} convolution"] += int(row.macs)
        elif packet in MATRIX:
            macs[f"{'backward' if backward else 'forward'} product"] += int(row.macs)
        else:
            macs[f"other: {packet}"] += int(row.macs)
    return macs


@dataclass
class Row:
    """MACs of one model; ``grouped`` where a grouped weight gradient was taken from its closed form."""

    model: str
    analyzed: dict[str, int] = field(default_factory=dict)
    torch: dict[str, int] = field(default_factory=dict)
    unpriced: list[str] = field(default_factory=list)
    grouped: bool = False
    error: str = ""

    @property
    def equal(self) -> bool:
        return not self.error and self.analyzed == self.torch


def measure(name: str, build: Callable[[], nn.Module], inputs: Any) -> Row:
    row = Row(name)
    torch.manual_seed(0)
    try:
        model = build().train()
        with sdpa_kernel(SDPBackend.MATH):
            step = e2pass.analyze(model, inputs).baseline
        row.analyzed = dict(sorted(analyzed_counts(step).items()))
        row.unpriced = sorted({op.op for op in step.unpriced})
        counted = torch_counts(model, inputs)
        row.torch = {kind: int(macs) for kind, macs in sorted(counted.macs.items()) if macs}
        row.grouped = counted.grouped
    except Exception as error:
        row.error = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
    return row


def models() -> Iterator[tuple[str, Callable[[], nn.Module], Any]]:
    """Name, constructor and inputs of every model: the shipped ones, then pytorchcv's, then transformers'."""
    image = torch.randn(2, 3, 32, 32)
    for depth in (20, 74, 110):
        yield f"e2pass resnet({depth})", partial(e2pass.models.resnet, depth), image
    yield "e2pass mobilenet_v2()", e2pass.models.mobilenet_v2, image
    sizes = {e["model"]: int(e["size"]) for e in csv.DictReader((HERE / "block_counts.csv").open(encoding="utf-8"))}
    for name in PYTORCHCV:
        file, constructor = name.split(".")
        module = importlib.import_module(f"pytorchcv.models.{file}")
        yield f"pytorchcv {constructor}", getattr(module, constructor), torch.randn(2, 3, sizes[name], sizes[name])
    for entry, build in transformer_models.entries():
        yield f"transformers {entry['model']}", build, transformer_models.inputs(entry)


def table(rows: list[Row]) -> str:
    """The page: a line for each model."""
    equal = sum(row.equal for row in rows)
    intro = f"""
        # MACs beside torch's FlopCounterMode

        {equal} of {len(rows)} models have exactly the MACs that torch's formulas give, kind by kind. Batch 2, from
        `python -m benchmarks.mac_counts`. Each model is run once, with every convolution and matrix product counted as
        torch dispatches it, and priced by `e2pass.analyze`, which does not run it; attention is decomposed on both
        sides (`sdpa_kernel(MATH)`). *grouped*: the model has grouped convolutions, whose weight gradients torch counts
        `groups` times too high; their closed form stands in its place. Matrix products of the backward half are dX and
        dW together.

        Recomputation: none is counted, because there is none. The step saves what its backward half reads. The
        exception is fused attention (decomposed here), whose backward computes the scores again:
        `B H L S (3 E + 2 Ev)` MACs, tested against torch's own formula for it.

        | model | forward conv | dX conv | dW conv | forward products | backward products | equal | note |
        |---|---:|---:|---:|---:|---:|---|---|"""
    lines = [line.strip() for line in intro.strip().splitlines()]
    for row in rows:
        counts = " | ".join(f"{row.analyzed.get(kind, 0):,}" for kind in KINDS)
        lines.append(f"| {row.model} | {counts} | {'yes' if row.equal else '**no**'} | {_note(row)} |")
    return "\n".join(lines) + "\n"


def _note(row: Row) -> str:
    notes = ["grouped"] if row.grouped else []
    notes += [f"not priced: {', '.join(row.unpriced)}"] if row.unpriced else []
    notes += [row.error] if row.error else []
    notes += [EXPLAINED[row.model]] if row.model in EXPLAINED else []
    if not row.error and not row.equal:
        kinds = sorted(set(row.analyzed) | set(row.torch))
        notes += [f"torch: {k} {row.torch.get(k, 0):,}" for k in kinds if row.analyzed.get(k, 0) != row.torch.get(k, 0)]
    return "; ".join(notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="part of a model's name")
    parser.add_argument("--again", action="store_true", help="measure models that have been measured")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    STATE.parent.mkdir(exist_ok=True)
    lines = STATE.read_text(encoding="utf-8").splitlines() if STATE.exists() else []
    done = {row.model: row for row in (Row(**json.loads(line)) for line in lines)}
    for name, build, inputs in models():
        if (options.only and options.only not in name) or (name in done and not options.again):
            continue
        done[name] = row = measure(name, build, inputs)
        with STATE.open("a", encoding="utf-8") as state:
            state.write(json.dumps(asdict(row)) + "\n")
        print(f"{name}: {'equal' if row.equal else 'DIFFERENT'} {_note(row)}", flush=True)
    if not options.only:
        text = table([done[name] for name, _, _ in models()])
        save(text, TABLE)


if __name__ == "__main__":
    main()
