"""Golden dumps: what each rewrite does to a graph, as text that a reviewer reads. E2PASS_UPDATE_GOLDEN=1 rewrites."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from e2pass.capture import capture
from e2pass.config import Config
from e2pass.diagnostics import Diagnostics
from e2pass.dump import dump
from e2pass.inputs import Inputs
from e2pass.passes.manager import PassManager
from e2pass.passes.registry import parse
from e2pass.program import Program
from tests.zoo import Residual

GOLDEN = Path(__file__).parent.parent / "golden"
FLAT = "find-residual-blocks,insert-gates"
LOWERED = f"{FLAT},outline,lower"
PIPELINES = {
    "insert_gates": FLAT,
    "lower": LOWERED,
    "quantize": f"{LOWERED},quantize",
    "bit_true": f"{LOWERED},quantize{{bit_true=true}}",
    "predict_signs": f"{LOWERED},quantize,predict-signs",
}


def text_of(name: str) -> str:
    """The flat graph of a tiny residual net, or the joint graph of its block's body, after a pipeline."""
    torch.manual_seed(0)
    body = (nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Residual(*body), nn.Flatten(1), nn.Linear(4 * 36, 5))
    inputs = Inputs.of(torch.randn(2, 3, 6, 6))
    program = Program.of(model, inputs, Config(), capture(model, inputs, Diagnostics()))
    PassManager(parse(PIPELINES[name])).run(program)
    if name == "insert_gates":
        return dump(program.graphs["train"].graph) + "\n"
    (region,) = [r for r in program.plans["train"].regions if r.block is not None]
    return dump(program.lowered[region.name][1].graph) + "\n"


@pytest.mark.parametrize("name", PIPELINES)
def test_dump_is_the_golden_one(name: str) -> None:
    path, text = GOLDEN / f"{name}.txt", text_of(name)
    if os.environ.get("E2PASS_UPDATE_GOLDEN") == "1":
        path.write_text(text)
    assert path.exists(), f"{path.name} is missing; E2PASS_UPDATE_GOLDEN=1 writes it"
    assert text == path.read_text()


def test_dumps_are_the_same_in_another_process() -> None:
    code = "from tests.passes.test_dumps import *; print(''.join(text_of(n) for n in PIPELINES), end='')"
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root, env=environment
    )
    assert result.stdout == "".join(text_of(name) for name in PIPELINES)


def test_dumps_hold_no_address_and_no_path() -> None:
    for name in PIPELINES:
        text = text_of(name)
        assert "0x" not in text
        assert str(Path.home()) not in text
        assert "f32[" in text
