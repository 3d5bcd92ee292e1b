"""Residual blocks found and expected, over pytorchcv and transformers models: writes ``docs/blocks.md``.

    python -m benchmarks.block_table            # goes on where it was stopped; state in --out, out/block_table.jsonl
    python -m benchmarks.block_table --at-most 10           # ten models more; the table lists what there is
    python -m benchmarks.block_table --only resnet20,ViT --again

Each model is then transformed and compared with its original: with gates open in outputs, gradients and buffers, and in
evaluation, each gate open for some samples and closed for others, skipped for real against multiplied by zero.

The expected counts are committed: for pytorchcv in ``block_counts.csv``, whose column ``units`` names the classes of
the residual units and the attributes that say whether a unit is residual, so that the count is checked against the
model's own modules; for transformers in ``transformer_models.json``, with the rule that gives it. Needs pytorchcv
(``pip install --no-deps pytorchcv``) and transformers.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import re
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import transformer_models
from e2pass.api import assemble
from e2pass.capture import Capture, capture
from e2pass.config import SLU, Config
from e2pass.diagnostics import Diagnostics
from e2pass.errors import E2PassError
from e2pass.inputs import Inputs
from e2pass.passes.find_residual_blocks import FindResidualBlocks
from e2pass.passes.insert_gates import InsertGates
from e2pass.passes.manager import PassManager
from e2pass.passes.outline import Outline
from e2pass.passes.residual import search
from e2pass.program import Program
from e2pass.report import save
from e2pass.verification import verify

HERE = Path(__file__).resolve().parent
TOLERANCE = 1e-4
TABLE = HERE.parent / "docs" / "blocks.md"


@dataclass
class Row:
    """One model of the table; None stands for what could not be had.

    Attributes:
        open_difference: Largest relative difference to the original with gates open.
        skip_difference: Largest relative difference between skipping for real and multiplying by zero.
        skipped: Share of the gates' decisions in that comparison that were to skip.
    """

    model: str
    expected: int
    rule: str
    capture: str = ""
    found: int | None = None
    gated: int | None = None
    milliseconds: float = 0.0
    not_gated: dict[str, int] = field(default_factory=dict)
    rejected: dict[str, int] = field(default_factory=dict)
    open_difference: float | None = None
    skip_difference: float | None = None
    skipped: float | None = None
    error: str = ""

    @property
    def exact(self) -> bool:
        return self.found == self.expected


def count_units(model: nn.Module, rule: str) -> int:
    """Count modules by ``Class``, ``Class.flag``, ``Class.!flag`` or ``Class.flag&other``, joined by ``+``."""
    total = 0
    for part in rule.split("+"):
        unit, _, flags = part.partition(".")
        wanted = [(flag.lstrip("!"), not flag.startswith("!")) for flag in flags.split("&") if flag]
        for module in model.modules():
            total += type(module).__name__ == unit and all(bool(getattr(module, f)) is value for f, value in wanted)
    return total


def measure(row: Row, model: nn.Module, inputs: Any) -> None:
    """Capture a model in training mode and search it."""
    torch.manual_seed(0)
    example = Inputs.of(inputs)
    diagnostics = Diagnostics()
    try:
        captured = capture(model.train(), example, diagnostics)
    except E2PassError as error:
        row.error = f"not captured: {str(error).splitlines()[0]}"
        return
    started = time.perf_counter()
    found = search(captured.train)
    row.milliseconds = round(1e3 * (time.perf_counter() - started), 1)
    row.capture = captured.rung
    if captured.leaves:
        why = next(d.message for d in diagnostics.with_code("E2P101", "E2P104"))
        row.error = f"{len(captured.leaves)} modules stay opaque: {why}"
    row.found, row.gated = len(found.blocks), sum(block.gated for block in found.blocks)
    for block in found.blocks:
        if not block.gated:
            reason = "contains another block" if "contains the block" in block.reason else block.reason
            row.not_gated[reason] = row.not_gated.get(reason, 0) + 1
    for join in found.rejected:
        reason = _general(join.reason)
        row.rejected[reason] = row.rejected.get(reason, 0) + 1
    try:
        compare(row, model, example, captured)
    except (E2PassError, RuntimeError) as error:
        row.error = f"{row.error}; not compared: {str(error).splitlines()[0]}".lstrip("; ")


def compare(row: Row, model: nn.Module, inputs: Inputs, captured: Capture) -> None:
    """Transform the captured model and compare it with the original."""
    program = Program.of(model, inputs, Config(smd=None, slu=SLU(), psg=None, bits=None), captured)
    PassManager([FindResidualBlocks(), InsertGates(), Outline()]).run(program)
    module = assemble(program)
    slu = module.e2_slu
    if slu is not None:
        with torch.random.fork_rng(devices=[]):
            module(*inputs.args, **inputs.kwargs)  # the gates see what their logits look like
        slu.price.zero_()  # every gate opens for the samples above its mean
        slu.reset_statistics()
    report = verify(module, program)
    row.open_difference = max(p.difference for p in report.proofs if "gates open" in p.name)
    if slu is not None:
        row.skip_difference = max(p.difference for p in report.proofs if "for real" in p.name)
        with torch.no_grad():
            module.eval()(*inputs.args, **inputs.kwargs)
        row.skipped = float(1 - slu.opened_eval.sum() / slu.decided_eval.sum())


def _general(reason: str) -> str:
    """Drop what is particular to one addition: names of nodes and shapes."""
    reason = re.sub(r" \([^()]*\)", "", reason)
    reason = re.sub(r"(?<=different shapes), and", "", reason)
    reason = re.sub(r"also goes to [\w.]+:", "also goes elsewhere:", reason)
    reason = re.sub(r"(the operand|between|part at|in place on) [\w.]+(?=[ ,])", r"\1 a node", reason)
    return reason.replace("the operand a node", "an operand")


class Turn:
    """Which models are measured in this call, and the file that keeps them."""

    def __init__(self, only: list[str], at_most: int | None, state: Path) -> None:
        self.only, self.left, self.state = only, at_most, state
        self.left_out: list[str] = []

    def takes(self, name: str) -> bool:
        if (self.only and not any(part in name for part in self.only)) or self.left == 0:
            self.left_out.append(name)
            return False
        if self.left is not None:
            self.left -= 1
        return True


def build(name: str, size: int) -> nn.Module:
    """Make ``file.constructor`` of pytorchcv; a model that enlarges its maps to fixed sizes, for images of ``size``."""
    file, constructor = name.split(".")
    make = getattr(importlib.import_module(f"pytorchcv.models.{file}"), constructor)
    model: nn.Module = make()
    if getattr(model, "fixed_size", False):
        model = make(in_size=(size, size))
    return model


def pytorchcv_rows(turn: Turn, done: dict[str, Row]) -> list[Row]:
    """Measure the models of ``block_counts.csv``; each in its own file, since the full list needs torchvision."""
    rows = []
    for entry in csv.DictReader((HERE / "block_counts.csv").open(encoding="utf-8")):
        name = entry["model"]
        rule = "; ".join(part for part in (entry["units"], entry["note"]) if part)
        if name in done:
            rows.append(replace(done[name], expected=int(entry["expected"]), rule=rule))
        elif turn.takes(name):
            size = int(entry["size"])
            model = build(name, size)
            row = Row(name, int(entry["expected"]), rule)
            if entry["units"] and count_units(model, entry["units"]) != row.expected:
                raise SystemExit(f"{name}: {entry['units']} gives {count_units(model, entry['units'])} units")
            measure(row, model, torch.randn(2, 3, size, size))
            rows.append(_keep(row, turn.state))
    return rows


def transformer_rows(turn: Turn, done: dict[str, Row]) -> list[Row]:
    """Measure the small random models of ``transformer_models.json``."""
    rows = []
    for entry, build in transformer_models.entries():
        name = entry["model"]
        if name in done:
            rows.append(done[name])
        elif turn.takes(name):
            torch.manual_seed(0)
            row = Row(name, entry["expected"], entry["rule"])
            measure(row, build(), transformer_models.inputs(entry))
            rows.append(_keep(row, turn.state))
    return rows


def _keep(row: Row, path: Path) -> Row:
    path.parent.mkdir(exist_ok=True)
    with path.open("a", encoding="utf-8") as state:
        state.write(json.dumps(asdict(row)) + "\n")
    verdict = "exact" if row.exact else f"expected {row.expected}"
    equal = f"differences {_difference(row.open_difference)}, {_difference(row.skip_difference)}"
    print(f"{row.model}: {row.found} blocks, {row.gated} gated, {verdict}, {equal} {row.error[:120]}", flush=True)
    return row


def _difference(value: float | None) -> str:
    return "-" if value is None else f"{value:.0e}" if value else "0"


def _counts(reasons: dict[str, int]) -> str:
    return "; ".join(f"{count} {reason}" for reason, count in sorted(reasons.items(), key=lambda r: -r[1]))


def _within(rows: list[Row]) -> str:
    """How many models are equal to their originals, in words."""
    compared = [row for row in rows if row.open_difference is not None]
    equal = [row for row in compared if max(row.open_difference or 0.0, row.skip_difference or 0.0) <= TOLERANCE]
    mixed = sum(row.skipped is not None and 0 < row.skipped < 1 for row in rows)
    with_gates = sum(row.skipped is not None for row in rows)
    return (
        f"{len(equal)} of {len(compared)} are equal within {TOLERANCE:.0e}\n"
        f"(with gates: {with_gates}; some decisions to skip and some to run in {mixed} of these)"
    )


def write_table(groups: dict[str, list[Row]], left_out: list[str]) -> None:
    """Write the document, whole or not at all."""
    rows = [row for group in groups.values() for row in group]
    exact = sum(row.exact for row in rows)
    excess = sum(max(0, (row.gated or 0) - row.expected) for row in rows)
    lines = [
        "# Residual blocks, found and expected",
        "",
        "Written by `python -m benchmarks.block_table`; do not edit. Expected counts are committed",
        "(`benchmarks/block_counts.csv`, `benchmarks/transformer_models.json`). Where the rule names classes, the",
        "count is taken from the model's modules; the other rules come from reading its code, and those of the DIA,",
        "ENet, NASNet, ChannelNet, RevNet and Wav2Vec2 rows were settled after a first search had pointed at them.",
        "",
        f"{exact} of {len(rows)} models exact ({exact / max(1, len(rows)):.1%}); gated blocks beyond the expected: "
        f"{excess}.",
        "",
        f"Each captured model was then transformed and compared with its original on two samples: {_within(rows)}.",
        "The column *open* has the largest relative difference in outputs, gradients and buffers with gates open, in",
        "training and evaluation; *skip* the one in evaluation between skipping for real and multiplying by zero, each",
        "gate open for the samples above the mean of its logits.",
    ]
    if left_out:
        lines += ["", f"Not measured yet: {', '.join(left_out)}."]
    for title, group in groups.items():
        head = "model | captured by | found | expected | gated | open | skip | rule | the rest"
        lines += ["", f"## {title}", "", f"| {head} |", f"|{'---|' * (head.count('|') + 1)}"]
        for row in group:
            rest = [f"not gated: {_counts(row.not_gated)}"] if row.not_gated else []
            rest += [f"no blocks: {_counts(row.rejected)}"] if row.rejected else []
            rest += [row.error] if row.error else []
            found = "-" if row.found is None else str(row.found) if row.exact else f"**{row.found}**"
            gated = "-" if row.gated is None else str(row.gated)
            cells = [f"`{row.model}`", row.capture or "-", found, str(row.expected), gated]
            cells += [_difference(row.open_difference), _difference(row.skip_difference), row.rule, ". ".join(rest)]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    save("\n".join(lines) + "\n", TABLE)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="parts of model names, separated by commas; writes no table")
    parser.add_argument("--at-most", type=int, help="measure so many models in this call; the next call goes on")
    parser.add_argument("--out", type=Path, default=HERE.parent / "out" / "block_table.jsonl", help="state, JSON lines")
    parser.add_argument("--again", action="store_true", help="forget what was measured before")
    options = parser.parse_args()
    only = [part for part in options.only.split(",") if part]
    done: dict[str, Row] = {}
    if options.again:
        options.out.unlink(missing_ok=True)
    elif options.out.exists():
        rows = (Row(**json.loads(line)) for line in options.out.read_text(encoding="utf-8").splitlines())
        done = {row.model: row for row in rows}
    turn = Turn(only, options.at_most, options.out)
    groups = {"transformers": transformer_rows(turn, done), "pytorchcv": pytorchcv_rows(turn, done)}
    if not only:
        write_table(groups, turn.left_out)


if __name__ == "__main__":
    main()
