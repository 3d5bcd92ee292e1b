"""``e2pass inspect`` and ``e2pass opt``."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from e2pass.cli import app
from e2pass.passes.registry import PASSES

SMALL = ("--input", "4x12")
MODEL = """
from collections import OrderedDict
from torch import nn
from tests.zoo import Residual

def build():
    body = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    return nn.Sequential(OrderedDict({"stem": nn.Linear(12, 8), "[red]": Residual(body), "head": nn.Linear(8, 3)}))
"""


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture
def model(tmp_path: Path) -> str:
    file = tmp_path / "mine.py"
    file.write_text(MODEL)
    return f"{file}:build"


def test_inspect_gives_every_block_and_gradient_with_its_reason(model: str) -> None:
    done = run("inspect", model, *SMALL)
    assert done.exit_code == 0
    text = done.stdout
    assert "residual blocks: 1, gated: 1" in text
    assert re.search(r"│ \[red\]\S* +│ identity +│ +2 │ yes", text), "brackets in names are no markup"
    assert "gradients of parameters: 6, replaced by predicted signs: 3" in text
    assert re.search(r"│ stem\.weight +│ yes", text)
    assert re.search(r"│ head\.bias +│ no +│ it has one dimension", text)
    assert "E2P100 info captured by symbolic_trace" in text


def test_inspect_prints_graph_diff_and_node_and_writes_a_page(model: str, tmp_path: Path) -> None:
    page = tmp_path / "step.html"
    done = run(
        "inspect", model, *SMALL, "--graph", "--diff", "--tag", "psg", "--node", "update/stem.weight", "--html", page
    )  # fmt: skip
    assert done.exit_code == 0
    listed, _, rest = done.stdout.partition("changes by kind")
    lines = [line for line in listed.splitlines() if line.startswith("%")]
    assert lines
    assert all("tag=psg." in line for line in lines)
    added = [line for line in listed.splitlines() if line.startswith("+ ")]
    assert len(added) == 20
    assert all("{psg." in line for line in added)
    left = re.search(r"^\.\.\. and (\d+) more added$", listed, re.MULTILINE)
    assert left
    assert f"\n{20 + int(left[1])} added, 0 removed, " in rest, "the summary comes last"
    assert re.search(r"│ added +│ psg.sign +│ +3 │", rest)
    assert "--all prints every change" in rest
    assert "optimizer.sgd_momentum" in rest
    assert re.search(r"energy \(modelled\) +│ [\d.]+ [num]J", rest)
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert f"wrote {page}" in done.stdout.replace("\n", "")


def test_the_whole_diff_of_a_part(model: str) -> None:
    done = run("inspect", model, *SMALL, "--diff", "--all", "--tag", "psg")
    counts, *lines = done.stdout.partition("changes by kind")[0].splitlines()
    added = int(counts.split()[0])
    assert added > 20
    assert sum(line.startswith("+ ") and "{psg." in line for line in lines) == added
    assert "more added" not in done.stdout
    assert "--all" not in done.stdout


def test_opt_runs_any_pipeline_and_prints_after_each_pass(model: str) -> None:
    passes = "find-residual-blocks,insert-gates{hidden=6,skip=0.3},outline"
    done = run("opt", model, *SMALL, "-p", passes, "--print-after-each", "--time")
    assert done.exit_code == 0
    flat, _, cut = done.stdout.partition("// after outline")
    assert "// after find-residual-blocks" in flat
    assert "// after insert-gates{skip=0.3,hidden=6}" in flat
    assert "%slu_gate_0: " in flat
    assert "target skip ratio 30%" in flat
    assert re.search(r"^region body_\S*red\S*$", cut, re.MULTILINE)
    assert re.search(r"│ outline +│ +[\d.]+ ms │ yes", cut)


def test_opt_runs_the_whole_pipeline(model: str) -> None:
    """Passes that price get their cost model from the command line."""
    done = run("opt", model, *SMALL, "-p", ",".join(PASSES))
    assert done.exit_code == 0
    assert "tag=psg.sign technique=psg" in done.stdout
    assert "// after" not in done.stdout


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ("find-blocks", "there is no pass 'find-blocks'; the passes are find-residual-blocks, insert-gates"),
        ("insert-gates{width=3}", "pass insert-gates has no option 'width=3'; its options"),
        ("insert-gates{hidden=x}", "insert-gates{hidden=x}: 'x' is not of type int"),
        ("insert-gates{hidden=0}", "SLU.hidden = 0 is not allowed"),
        ("insert-gates;outline", "unexpected ';outline' after pass 'insert-gates'; passes are separated by commas"),
        ("lower", "pass lower (after no other): lower needs regions; run the passes that establish it first"),
    ],
)
def test_a_bad_pipeline_gets_one_line(model: str, passes: str, message: str) -> None:
    done = run("opt", model, *SMALL, "-p", passes)
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_bad_names_get_one_line_and_leave_nothing(model: str, tmp_path: Path) -> None:
    cases = {
        ("--node", "update/stem"): "no node 'update/stem'; similar names are ",
        ("--graph", "--all"): "--all is for --diff; give both",
        ("--node", "update/stem.weight", "--tag", "psg"): "--tag narrows --graph, --diff and --html; give one of them",
        ("--graph", "--path", "stems"): "the graph has no path 'stems'; it has stem, ",
    }
    for arguments, message in cases.items():
        done = run("inspect", model, *SMALL, "--config", "smd", *arguments)
        assert done.exit_code == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
    done = run("inspect", model, *SMALL, "--html", tmp_path / "none" / "page.html")
    assert (done.exit_code, done.stderr.count("there is no folder")) == (2, 1)
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith("__")] == ["mine.py"]
