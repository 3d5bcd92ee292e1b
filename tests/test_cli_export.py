"""``e2pass export``: every format from the command line, in one process each way."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from typer.testing import CliRunner, Result

from e2pass.cli import app

SOURCE = """
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return x + self.layer(x)

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.head = Block(), nn.Linear(3, 5)

    def forward(self, x):
        return self.head(self.block(x).unflatten(1, (2, 3)))

class OwnLoss(Words):
    def forward(self, x):
        return super().forward(x).square().mean()

def words():
    return Words()

def own_loss():
    return OwnLoss()

def net():
    return nn.Sequential(nn.Linear(6, 6), Block(), Block(), nn.Linear(6, 3))
"""


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "model.py").write_text(SOURCE)
    return f"{tmp_path / 'model.py'}:net"


def export(model: str, to: str, out: Path, *more: str) -> Result:
    arguments = ["export", model, "--input", "4x6", "--to", to, "-o", str(out), *more]
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


@pytest.mark.parametrize(
    ("to", "holds"),
    [("zigzag", "equation"), ("scalesim", "Layer,M,N,K,"), ("model-explorer", '"results"'), ("dot", "digraph")],
)
def test_text_formats(model: str, tmp_path: Path, to: str, holds: str) -> None:
    out = tmp_path / "out.txt"
    done = export(model, to, out)
    assert done.exit_code == 0, done.output
    assert f"wrote {out}" in done.stdout
    assert holds in out.read_text()


def test_page_and_onnx(model: str, tmp_path: Path) -> None:
    assert export(model, "html", tmp_path / "a.html", "--config", "slu").exit_code == 0
    assert "<html" in (tmp_path / "a.html").read_text()
    for to, more in (
        ("onnx-inference", ["--masked"]),
        ("onnx-train", ["--optimizer", "adam", "--lr", "0.01", "--target", "4:int64"]),
        ("onnx-annotated", []),
    ):
        out = tmp_path / f"{to}.onnx"
        done = export(model, to, out, "--config", "slu", *more)
        assert done.exit_code == 0, done.output
        onnx.checker.check_model(onnx.load(out))
    step = onnx.load(tmp_path / "onnx-train.onnx")
    assert any(output.name.endswith(".exp_avg_sq") for output in step.graph.output)


def test_a_target_is_only_needed_where_the_model_does_not_tell_it(model: str, tmp_path: Path) -> None:
    """Labels for every place of a sequence, and none for a model that returns its loss."""
    for build, names in (("words", {"x", "target"}), ("own_loss", {"x"})):
        out = tmp_path / f"{build}.onnx"
        done = export(model.replace(":net", f":{build}"), "onnx-train", out, "--config", "slu")
        assert done.exit_code == 0, done.output
        inputs = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in onnx.load(out).graph.input}
        assert names <= set(inputs)
        assert inputs.get("target") == ([4, 2] if build == "words" else None)


def test_bad_options_get_one_line_and_leave_nothing(model: str, tmp_path: Path) -> None:
    done = export(model, "tensorflow", tmp_path / "m")
    assert done.exit_code == 2
    assert "--to 'tensorflow' is not allowed; choose one of onnx-inference, onnx-train" in done.stderr
    done = export(model, "onnx-train", tmp_path / "m", "--checkpoint", str(tmp_path / "none.pt"))
    assert done.exit_code == 2
    assert "there is no checkpoint" in done.stderr
    done = export(model, "zigzag", tmp_path / "m", "--lr", "0.1")
    assert done.exit_code == 2
    assert "--lr does nothing for --to zigzag; it is for onnx-train" in done.stderr
    done = export(model, "onnx-train", tmp_path / "m", "--config", "slu", "--target", "5:int64")
    assert done.exit_code == 2
    assert "cross-entropy takes no output of shape [4, 3] with a target of shape [5]" in done.stderr
    assert done.stderr.count("\n") == 1
    done = export(model, "onnx-inference", tmp_path / "m", "--checkpoint", model.partition(":")[0])
    assert "is no state dict that torch.save wrote (" in done.stderr
    assert export(model, "dot", tmp_path / "none" / "m").exit_code == 2
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("m") and p.suffix != ".py"] == []
