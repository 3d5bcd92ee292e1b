"""The command line: what it prints and writes, and that bad input gets one line, code 2 and leaves nothing behind."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import e2pass
from e2pass.backends.fpga import FpgaCostModel
from e2pass.cli import app
from e2pass.cli.options import PRESETS
from e2pass.cli.target import build_model, parse_inputs
from e2pass.errors import InputError
from e2pass.report import CostReport

RESNET = ("e2pass.models:resnet", '{"depth": 8}')
SMALL = ("--input", "4x3x8x8")
BOARD = Path(__file__).resolve().parent.parent / "backends" / "fpga" / "boards" / "zedboard.yaml"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_version_and_help() -> None:
    assert run("--version").stdout.strip() == e2pass.__version__
    for command in ("demo", "analyze", "compare", "inspect", "boards"):
        assert command in run("--help").stdout
        assert run(command, "--help").exit_code == 0


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from e2pass.cli import app; "
        "print([m for m in ('torch', 'pydantic', 'yaml', 'numpy', 'sklearn', 'onnx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_analyze_prints_what_the_library_says(folder: Path) -> None:
    expected = e2pass.analyze(e2pass.models.resnet(8), torch.randn(4, 3, 8, 8))
    printed = run("analyze", *RESNET, *SMALL, "--format", "json")
    assert printed.exit_code == 0
    found = CostReport.from_json(printed.stdout)
    assert found.transformed is None
    assert found.baseline.totals == expected.baseline.totals

    assert not list(folder.iterdir())


def test_the_objective_is_that_of_the_cost_model() -> None:
    conv = ("torch.nn:Conv2d", '{"in_channels": 8, "out_channels": 8, "kernel_size": 3}')
    found = CostReport.from_json(run("analyze", *conv, "-i", "4x8x8x8", "--objective", "latency", "-f", "json").stdout)
    model = FpgaCostModel("zedboard", objective="latency")
    expected = e2pass.analyze(torch.nn.Conv2d(8, 8, 3), torch.randn(4, 8, 8, 8), board=model)
    assert found.baseline.totals == expected.baseline.totals
    assert "for least time" in found.assumptions["mapping"]


def test_formats() -> None:
    linear = ("analyze", "torch.nn:Linear", '{"in_features": 3, "out_features": 2}', "-i", "4x3")
    expected = e2pass.analyze(torch.nn.Linear(3, 2), torch.randn(4, 3))
    rows = list(csv.DictReader(io.StringIO(run(*linear, "-f", "csv").stdout)))
    assert {row.name for row in expected.baseline.rows} <= {row["name"] for row in rows}
    assert "| energy |" in run(*linear, "-f", "md").stdout
    assert "modelled, not measured" in run(*linear).stdout


def test_analyze_with_a_preset_writes_a_file(folder: Path) -> None:
    done = run("analyze", RESNET[0], "--kwargs", RESNET[1], *SMALL, "--config", "smd", "-f", "json", "-o", "cost.json")
    assert done.exit_code == 0
    assert done.stdout == ""
    report = CostReport.from_json(folder / "cost.json")
    assert report.saving.energy == pytest.approx(0.5)  # a dropped batch costs nothing, and half are dropped
    assert [path.name for path in folder.iterdir()] == ["cost.json"]


def test_limits_on_the_energy_ratio_and_comparison(folder: Path) -> None:
    linear = ("analyze", "torch.nn:Linear", '{"in_features": 3, "out_features": 2}', "-i", "4x3", "--config", "smd")
    passed = run(*linear, "--max-energy-ratio", "0.5", "-f", "json", "-o", "a.json", "--steps", "100")
    assert passed.exit_code == 0
    failed = run(*linear, "--max-energy-ratio", "0.49", "-f", "html", "-o", "a.html")
    assert failed.exit_code == 1
    assert "energy ratio 0.5000, above the limit of 0.49" in failed.stderr
    assert (folder / "a.html").read_text().startswith("<!doctype html>")
    report = CostReport.from_json(folder / "a.json")
    assert report.run == report.for_run(100)
    assert run(*linear[:-2], "-f", "json", "-o", "b.json", "--epochs", "2", "--dataset-size", "9").exit_code == 0
    assert CostReport.from_json(folder / "b.json").run == CostReport.from_json(folder / "b.json").for_run(6)
    same = run("compare", "a.json", "b.json", "--max-energy-ratio", "1")
    assert same.exit_code == 0
    assert "baseline step" in same.stdout
    assert run("compare", "a.json", "b.json", "--max-energy-ratio", "0.99").exit_code == 1
    assert json.loads(run("compare", "a.json", "b.json", "-f", "json").stdout)["energy_ratio"] == 1.0


def test_board_file_is_accepted(folder: Path) -> None:
    (folder / "mine.yaml").write_text(BOARD.read_text().replace("name: zedboard", "name: mine"))
    linear = ("torch.nn:Linear", '{"in_features": 3, "out_features": 2}', "-i", "4x3")
    done = run("analyze", *linear, "--board", "mine.yaml", "-f", "json")
    assert json.loads(done.stdout)["board"] == "mine"
    assert "valid, board mine" in run("boards", "validate", "mine.yaml").stdout


def test_model_from_a_file(folder: Path) -> None:
    (folder / "neighbour.py").write_text("WIDTH = 5\n")
    (folder / "mine.py").write_text(
        "from torch import nn\nfrom neighbour import WIDTH\n\n"
        "def build(bias=True):\n    return nn.Linear(3, WIDTH, bias=bias)\n\nready = nn.Linear(3, 2)\n"
    )
    assert build_model("mine.py:build", '{"bias": false}').bias is None
    assert build_model("mine:build").out_features == 5  # as a module of the working directory
    assert build_model("mine.py:ready").out_features == 2
    done = run("inspect", "mine.py:build", "-i", "2x3", "--config", "neutral")
    assert done.exit_code == 0
    assert "residual blocks: 0" in done.stdout


def test_fail_on_unpriced(folder: Path) -> None:
    (folder / "odd.py").write_text(
        "import torch\n\nclass Odd(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.fc = torch.nn.Linear(4, 4)\n\n    def forward(self, x):\n"
        "        return torch.special.i0e(self.fc(x))\n"
    )
    assert run("analyze", "odd.py:Odd", "-i", "2x4").exit_code == 0
    failed = run("analyze", "odd.py:Odd", "-i", "2x4", "--fail-on-unpriced")
    assert failed.exit_code == 1
    assert "have no price: " in failed.stderr
    assert "i0e" in failed.stderr
    linear = ("torch.nn:Linear", '{"in_features": 3, "out_features": 2}')
    assert run("analyze", *linear, "-i", "4x3", "--fail-on-unpriced").exit_code == 0


def test_inspect_shows_blocks_with_reasons() -> None:
    done = run("inspect", *RESNET, *SMALL, "--config", "slu")
    assert done.exit_code == 0
    for text in ("residual blocks: 3, gated: 3", "stage1.0", "identity", "stage2.0", "projection", "E2P100 info"):
        assert text in done.stdout


def test_boards() -> None:
    for arguments in (["boards"], ["boards", "list"]):
        assert all(name in run(*arguments).stdout for name in ("zedboard", "zcu102", "asic45"))
    shown = run("boards", "show", "zedboard").stdout
    assert "clock_mhz" in shown
    assert "data sheet" in shown
    assert "valid, board zedboard" in run("boards", "validate", BOARD).stdout


BAD = {
    "no colon": (["analyze", "resnet", *SMALL], "is not package.module:callable"),
    "no module": (["analyze", "no_such_module:f", *SMALL], "cannot import no_such_module"),
    "no file": (["analyze", "none.py:f", *SMALL], "there is no file none.py"),
    "no callable": (["analyze", "e2pass.models:resnt", *SMALL], "has no 'resnt'; it has"),
    "no module returned": (["analyze", "builtins:dict", *SMALL], "returned a dict; a torch.nn.Module is needed"),
    "no JSON": (["analyze", RESNET[0], "{depth}", *SMALL], "are not JSON"),
    "no object": (["analyze", RESNET[0], "[8]", *SMALL], "are no JSON object"),
    "twice": (["analyze", *RESNET, "--kwargs", "{}", *SMALL], "were given twice"),
    "argument missing": (["analyze", RESNET[0], *SMALL], "missing 1 required positional argument: 'depth'"),
    "model refuses": (["analyze", RESNET[0], '{"depth": 9}', *SMALL], "depth must be 6n + 2"),
    "input form": (["analyze", *RESNET, "--input", "4,3,8,8"], "is not [NAME=]DIMS[:DTYPE]"),
    "input size": (["analyze", *RESNET, "--input", "0x3x8x8"], "has a size of 0"),
    "input type": (["analyze", *RESNET, "--input", "4x3x8x8:int7"], "unknown type 'int7'; choose one of float32"),
    "input misfit": (["analyze", *RESNET, "--input", "4x1x8x8"], "ResNet"),
    "format": (["analyze", *RESNET, *SMALL, "-f", "xml"], "choose one of table, json, csv, md"),
    "preset": (["analyze", *RESNET, *SMALL, "--config", "e3"], "unknown config 'e3'; give"),
    "board": (["analyze", *RESNET, *SMALL, "--board", "none"], "no board 'none': give one of asic45, zcu102, zedboard"),
    "output folder": (["analyze", *RESNET, *SMALL, "-o", "none/cost.json"], "there is no folder"),
    "output is a folder": (["analyze", *RESNET, *SMALL, "-o", "."], "it is a folder"),
    "objective": (["analyze", *RESNET, *SMALL, "--objective", "speed"], "choose one of energy, latency"),
    "dW": (["analyze", *RESNET, *SMALL, "--dw-skips", "tile"], "choose 'element' or 'tensor'"),
    "limit": (["analyze", *RESNET, *SMALL, "--max-energy-ratio", "1"], "say what to transform with, --config"),
    "no report": (["compare", "none.json", "none.json"], "no cost report can be read from none.json"),
    "inspect": (["inspect", *RESNET, *SMALL, "--config", "e3"], "unknown config 'e3'"),
    "show": (["boards", "show", "none"], "no board 'none'"),
    "validate": (["boards", "validate", "none.yaml"], "no board 'none.yaml'"),
    "seeds": (["demo", "--seeds", "a"], "is no list of whole numbers"),
    "equal seeds": (["demo", "--seeds", "1,1"], "seeds are different"),
    "epochs": (["demo", "--epochs", "0"], "epochs = 0 is not allowed"),
    "data": (["demo", "--data", "none.npz"], "cannot read the data file none.npz"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_and_leaves_nothing(case: str, folder: Path) -> None:
    arguments, message = BAD[case]
    done = run(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.startswith("e2pass: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout.strip() == ""
    assert not list(folder.iterdir())


def test_malformed_board_and_failing_file(folder: Path) -> None:
    (folder / "bad.yaml").write_text("name: [")
    (folder / "bad.py").write_text("1 / 0\n")
    (folder / "mute.py").write_text("def f():\n    raise RuntimeError\n")
    for arguments, message in (
        (["boards", "validate", "bad.yaml"], "bad.yaml is not valid YAML"),
        (["analyze", "bad.py:f", *SMALL], "running bad.py failed: ZeroDivisionError"),
        (["analyze", "mute.py:f", *SMALL], "mute.py:f with arguments {} failed: RuntimeError\n"),
    ):
        done = run(*arguments)
        assert done.exit_code == 2
        assert done.stderr.count("\n") == 1
        assert message in done.stderr


def test_a_callable_may_import_its_neighbours_when_it_is_called(folder: Path) -> None:
    (folder / "there").mkdir()
    (folder / "there" / "e2_neighbour.py").write_text("import torch\nmade = torch.nn.Linear(4, 2)\n")
    (folder / "there" / "late.py").write_text("def build():\n    import e2_neighbour\n    return e2_neighbour.made\n")
    before = list(sys.path)
    assert isinstance(build_model("there/late.py:build"), torch.nn.Linear)
    assert sys.path == before


def test_a_folder_that_cannot_be_written_to_is_said_before_the_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # the user of a container may write everywhere
    for arguments in (["analyze", "none.py:f", *SMALL, "-o", "a.json"], ["demo", "--data", "none.npz"]):
        done = run(*arguments)
        assert done.exit_code == 2
        assert done.stderr.count("\n") == 1
        assert f"the folder {folder} is not writable" in done.stderr


def test_inputs() -> None:
    assert parse_inputs(["2x3"]).shape == (2, 3)
    first, second = parse_inputs(["2x3:float64", "4:int64"])
    assert (first.dtype, second.dtype) == (torch.float64, torch.int64)
    assert not second.any()
    named = parse_inputs(["input_ids=2x5:int64", "mask=2x5:bool"])
    assert list(named) == ["input_ids", "mask"]
    for texts, message in (
        (["a=2x3", "4"], "either every --input has a name"),
        (["a=2", "a=3"], "are not all different"),
        (["999999999x999999999"], "does not fit into memory"),
    ):
        with pytest.raises(InputError, match=message):
            parse_inputs(texts)


@pytest.mark.parametrize("command", ["analyze", "inspect", "export"])
def test_help_names_every_preset(command: str) -> None:
    assert list(PRESETS) == list(e2pass.PRESETS)
    printed = " ".join(run(command, "--help").output.replace("│", " ").split())
    assert "e2train | paper | smd" in printed
    assert "…" not in printed, "a text was cut"
