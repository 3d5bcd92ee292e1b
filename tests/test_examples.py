"""Every example runs to its end, as its own process, in a folder of its own, and writes what it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
FILES = {
    "transform_any_model": set(),
    "inspect_graph": {"block.dot", "training_graph.dot", "training_graph.html", "training_graph.txt"},
    "export_cost_report": {
        "cost_report.json",
        "cost_report.csv",
        "cost_report.md",
        "cost_report.tex",
        "cost_report.html",
    },
    "finetune_frozen": set(),
    "train_on_device": {"training_step.onnx", "digits.npz", "trained.npz"},
}
PRINTS = {
    "train_on_device": (
        "steps without torch: loss 2",
        "samples that entered the gated blocks: ",
        "more in PyTorch: loss 1",
    ),
    "transform_any_model": ("batches dropped: ", "gated energy skipped: ", "energy saved (modelled): "),
    "inspect_graph": ("stage1.0: identity, 5 nodes, gated", "E2P100", "inserted for PSG: "),
    "export_cost_report": ("plain run: ", "transformed run: ", "ddr3 traffic"),
    "finetune_frozen": ("transformed: dW of {'fc'}, dX of nothing, update of {'fc'}",),
}


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(FILES)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FILES))
def test_example(name: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, EXAMPLES / f"{name}.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    for text in PRINTS[name]:
        assert text in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == FILES[name]
    assert all(path.stat().st_size > 100 for path in tmp_path.iterdir())
