"""Residual blocks found and expected, over pytorchcv and transformers models: writes ``docs/blocks.md``.

    python benchmarks/block_table.py            # goes on where it was stopped; state in out/block_table.jsonl
    python benchmarks/block_table.py --only resnet20,ViT --again

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
import os
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from e2pass.capture import capture
from e2pass.diagnostics import Diagnostics
from e2pass.errors import E2PassError
from e2pass.inputs import Inputs
from e2pass.passes.residual import search

HERE = Path(__file__).resolve().parent
STATE = HERE.parent / "out" / "block_table.jsonl"
TABLE = HERE.parent / "docs" / "blocks.md"


@dataclass
class Row:
    """One model of the table; counts are None where the model could not be captured."""

    model: str
    expected: int
    rule: str
    capture: str = ""
    found: int | None = None
    gated: int | None = None
    milliseconds: float = 0.0
    not_gated: dict[str, int] = field(default_factory=dict)
    rejected: dict[str, int] = field(default_factory=dict)
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
    try:
        captured = capture(model.train(), Inputs.of(inputs), Diagnostics())
    except E2PassError as error:
        row.error = str(error).splitlines()[0]
        return
    started = time.perf_counter()
    found = search(captured.train)
    row.milliseconds = round(1e3 * (time.perf_counter() - started), 1)
    row.capture = captured.rung
    row.found, row.gated = len(found.blocks), sum(block.gated for block in found.blocks)
    for block in found.blocks:
        if not block.gated:
            reason = "contains another block" if "contains the block" in block.reason else block.reason
            row.not_gated[reason] = row.not_gated.get(reason, 0) + 1
    for join in found.rejected:
        reason = _general(join.reason)
        row.rejected[reason] = row.rejected.get(reason, 0) + 1


def _general(reason: str) -> str:
    """Drop what is particular to one addition: names of nodes and shapes."""
    reason = re.sub(r" \([^()]*\)", "", reason)
    reason = re.sub(r"(?<=different shapes), and", "", reason)
    reason = re.sub(r"also goes to [\w.]+:", "also goes elsewhere:", reason)
    reason = re.sub(r"(the operand|between|part at|in place on) [\w.]+(?=[ ,])", r"\1 a node", reason)
    return reason.replace("the operand a node", "an operand")


def pytorchcv_rows(only: list[str], done: dict[str, Row]) -> list[Row]:
    """Measure the models of ``block_counts.csv``; each in its own file, since the full list needs torchvision."""
    rows = []
    for entry in csv.DictReader((HERE / "block_counts.csv").open(encoding="utf-8")):
        name = entry["model"]
        rule = "; ".join(part for part in (entry["units"], entry["note"]) if part)
        if name in done:
            rows.append(done[name])
        elif _wanted(name, only):
            file, constructor = name.split(".")
            model: nn.Module = getattr(importlib.import_module(f"pytorchcv.models.{file}"), constructor)()
            row = Row(name, int(entry["expected"]), rule)
            if entry["units"] and count_units(model, entry["units"]) != row.expected:
                raise SystemExit(f"{name}: {entry['units']} gives {count_units(model, entry['units'])} units")
            size = int(entry["size"])
            measure(row, model, torch.randn(2, 3, size, size))
            rows.append(_keep(row))
    return rows


def transformer_rows(only: list[str], done: dict[str, Row]) -> list[Row]:
    """Measure the small random models of ``transformer_models.json``."""
    rows = []
    for entry in json.loads((HERE / "transformer_models.json").read_text(encoding="utf-8")):
        name = entry["model"]
        if name in done:
            rows.append(done[name])
        elif _wanted(name, only):
            config = getattr(transformers, entry["config"])(**entry["settings"])
            torch.manual_seed(0)
            row = Row(name, entry["expected"], entry["rule"])
            measure(row, getattr(transformers, name)(config), _inputs(entry["inputs"]))
            rows.append(_keep(row))
    return rows


def _inputs(wanted: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Make token ids, masks or features from their shapes."""
    made: dict[str, torch.Tensor] = {}
    for name, shape in wanted.items():
        if name.endswith("input_ids"):
            made[name] = torch.randint(3, 40, shape)
        else:
            made[name] = torch.ones(shape, dtype=torch.long) if name.endswith("mask") else torch.randn(shape)
    return made


def _wanted(name: str, only: list[str]) -> bool:
    return not only or any(part in name for part in only)


def _keep(row: Row) -> Row:
    STATE.parent.mkdir(exist_ok=True)
    with STATE.open("a", encoding="utf-8") as state:
        state.write(json.dumps(asdict(row)) + "\n")
    verdict = "exact" if row.exact else f"expected {row.expected}"
    print(f"{row.model}: {row.found} blocks, {row.gated} gated, {verdict} {row.error[:120]}", flush=True)
    return row


def _counts(reasons: dict[str, int]) -> str:
    return "; ".join(f"{count} {reason}" for reason, count in sorted(reasons.items(), key=lambda r: -r[1]))


def write_table(groups: dict[str, list[Row]]) -> None:
    """Write the document, whole or not at all."""
    rows = [row for group in groups.values() for row in group]
    exact = sum(row.exact for row in rows)
    excess = sum(max(0, (row.gated or 0) - row.expected) for row in rows)
    lines = [
        "# Residual blocks, found and expected",
        "",
        "Written by `benchmarks/block_table.py`; do not edit. Expected counts are committed",
        "(`benchmarks/block_counts.csv`, `benchmarks/transformer_models.json`). Where the rule names classes, the",
        "count is taken from the model's modules; the other rules come from reading its code, and those of the DIA,",
        "NASNet, ChannelNet and Wav2Vec2 rows were settled after a first search had pointed at them.",
        "",
        f"{exact} of {len(rows)} models exact ({exact / max(1, len(rows)):.1%}); gated blocks beyond the expected: "
        f"{excess}.",
    ]
    for title, group in groups.items():
        lines += ["", f"## {title}", "", "| model | captured by | found | expected | gated | rule | the rest |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for row in group:
            rest = [f"not gated: {_counts(row.not_gated)}"] if row.not_gated else []
            rest += [f"no blocks: {_counts(row.rejected)}"] if row.rejected else []
            rest += [f"not captured: {row.error}"] if row.error else []
            found = "-" if row.found is None else str(row.found) if row.exact else f"**{row.found}**"
            gated = "-" if row.gated is None else str(row.gated)
            cells = [f"`{row.model}`", row.capture or "-", found, str(row.expected), gated, row.rule, ". ".join(rest)]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    unfinished = TABLE.with_suffix(".tmp")
    unfinished.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(unfinished, TABLE)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="parts of model names, separated by commas; writes no table")
    parser.add_argument("--again", action="store_true", help="forget what was measured before")
    options = parser.parse_args()
    only = [part for part in options.only.split(",") if part]
    done: dict[str, Row] = {}
    if options.again:
        STATE.unlink(missing_ok=True)
    elif STATE.exists():
        rows = (Row(**json.loads(line)) for line in STATE.read_text(encoding="utf-8").splitlines())
        done = {row.model: row for row in rows}
    groups = {"transformers": transformer_rows(only, done), "pytorchcv": pytorchcv_rows(only, done)}
    if not only:
        write_table(groups)


if __name__ == "__main__":
    main()
