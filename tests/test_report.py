from __future__ import annotations

import csv
import io
import itertools
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import e2pass
from e2pass.backends.fpga import FpgaCostModel
from e2pass.backends.html import to_html
from e2pass.cost import CostModel, Free, OpCost, OpSite, Phase, Technique, TensorSpec, Unsupported
from e2pass.errors import InputError
from e2pass.report import BASIS, CostReport, StepCost, compare, pivot, price_step
from tests.reports import HOSTILE, made_up


class Fixed:
    """A cost model with one price: 2 J, 0.5 s, 10 MACs, 8 bytes."""

    name, dram = "fixed", "dram"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def sources(self) -> dict[str, str]:
        return {"price_j": "2 (estimate): made up for a test"}

    def cost(self, site: OpSite) -> OpCost | Free | Unsupported:
        self.asked.append(site.name)
        if site.op == "view":
            return Free("a view of the same bytes")
        if site.op.startswith("odd"):
            return Unsupported("no formula | for this")
        return OpCost(10, 3, 50, 0.5, {"compute": 0.5, "dram": 1, "static": 0.5}, {"sram": 16, "dram": 8}, "fixed")


def op(name: str, kind: str = "relu", probability: float = 1.0, **where: object) -> OpSite:
    spec = TensorSpec((2, 3))
    return OpSite(name, kind, (spec,), (spec,), probability=probability, **where)  # type: ignore[arg-type]


SITES = [
    op("r0/a", layer="stem", region="r0"),
    op("r0/b", layer="body", block="b1", probability=0.5, phase=Phase.DW, technique=Technique.PSG),
    op("r0/c", "view"),
    op("r0/d", layer="body", phase=Phase.UPDATE),
]


def price(sites: list[OpSite], model: CostModel | None = None) -> StepCost:
    return price_step(sites, model or Fixed())


def report(*, with_transformed: bool = True, odd: bool = False) -> CostReport:
    before = [*SITES, op("r0/e", "odd")] if odd else SITES
    after = price([op("r0/a", probability=0.25)]) if with_transformed else None
    return CostReport(
        "fixed",
        price(before),
        after,
        assumptions={"rates": "assumed", "loss": "cross-entropy"},
        sources=Fixed().sources(),
    )


def test_totals_are_expectations() -> None:
    step = price(SITES)
    assert (step.energy_j, step.time_s, step.macs, step.dram_bytes) == (5, 1.25, 25, 20)
    assert [row.total_j for row in step.rows] == [2, 1, 2]
    assert step.rows[1].probability == 0.5
    assert [(f.name, f.reason) for f in step.free] == [("r0/c", "a view of the same bytes")]


def test_every_breakdown_adds_up_to_the_total() -> None:
    step = price(SITES)
    for found in (step.by_phase(), step.by_technique(), step.by_layer(), step.by_block()):
        assert sum(t.energy_j for t in found.values()) == step.energy_j
        assert sum(t.macs for t in found.values()) == step.macs
    assert sum(step.by_level().values()) == step.energy_j
    assert list(step.by_phase()) == ["forward", "dw", "update"]
    assert step.by_technique()["psg"].energy_j == 1
    assert step.by_layer()["body"].energy_j == 3
    assert step.by_block() == {"": step.by_block()[""], "b1": step.by_technique()["psg"]}
    assert step.by_level() == {"compute": 1.25, "dram": 2.5, "static": 1.25}
    assert step.traffic_by_level() == {"sram": 40, "dram": 20}


def test_equal_operations_are_priced_once() -> None:
    model = Fixed()
    price_step([op(f"n{i}", probability=i / 9) for i in range(10)] + [op("other", "tanh")], model)
    assert model.asked == ["n0", "other"]


def test_operations_that_cannot_be_hashed_are_priced_all_the_same() -> None:
    site = OpSite("a", "relu", ([1, 2],), (TensorSpec((2,)),))
    assert price([site, site]).energy_j == 4


@given(st.lists(st.floats(0, 1), max_size=8), st.lists(st.floats(0, 1), max_size=8))
def test_cost_is_additive_and_scales_with_the_probability(one: list[float], other: list[float]) -> None:
    model = FpgaCostModel("zedboard")
    first, second = ([op(f"n{i}", "aten.gelu.default", p) for i, p in enumerate(ps)] for ps in (one, other))
    both = price(first + second, model)
    assert both.energy_j == pytest.approx(price(first, model).energy_j + price(second, model).energy_j)
    assert both.dram_bytes == pytest.approx(sum((*one, *other)) * 48)


def test_unpriced_operations_are_listed_and_in_no_total() -> None:
    with_odd, without = price([*SITES, op("r0/e", "odd", 0.5)]), price(SITES)
    assert with_odd.totals == without.totals
    (missing,) = with_odd.unpriced
    assert (missing.name, missing.op, missing.reason) == ("r0/e", "odd", "no formula | for this")
    assert missing.estimated_bytes == 0.5 * (24 + 24)
    assert missing.estimated_macs == 0.5 * 6
    cover = with_odd.coverage
    assert cover.ops == 4 / 5
    assert cover.bytes == 20 / (20 + 24)
    assert cover.macs == 25 / (25 + 3)
    assert not cover.complete


def test_an_unpriced_matrix_product_counts_as_one() -> None:
    """Its MACs follow from the sizes of three matrices: sqrt(mk * kn * mn) = mkn."""
    a, b, c = TensorSpec((5, 7)), TensorSpec((7, 3)), TensorSpec((5, 3))
    (missing,) = price([OpSite("x", "odd.mm", (a, b), (c,))]).unpriced
    assert missing.estimated_macs == pytest.approx(5 * 7 * 3)


def test_full_coverage_is_exactly_one() -> None:
    cover = report().coverage
    assert (cover.ops, cover.macs, cover.bytes, cover.unpriced) == (1, 1, 1, ())
    assert cover.complete


def test_an_empty_step_costs_nothing() -> None:
    step = price([])
    assert (step.energy_j, step.by_phase(), step.coverage.ops) == (0, {}, 1)
    assert CostReport("fixed", step, step).saving.energy is None


def test_coverage_is_that_of_both_steps() -> None:
    whole = CostReport("fixed", price(SITES), price([op("z", "odd")]))
    assert whole.coverage.ops == 4 / 5
    assert whole.baseline.coverage.ops == 1


def test_saving() -> None:
    saving = report().saving
    assert saving.energy == pytest.approx(0.9)
    assert saving.time == pytest.approx(0.9)
    assert saving.macs == pytest.approx(0.9)
    assert saving.dram == pytest.approx(0.9)
    none = report(with_transformed=False).saving
    assert (none.energy, none.time, none.macs, none.dram) == (None, None, None, None)


def test_a_whole_run() -> None:
    run = report().for_run(steps=7200)
    assert run.baseline.energy_j == 36000
    assert run.baseline.energy_kj == 36
    assert run.baseline.energy_kwh == 0.01
    assert run.baseline.hours == 2.5
    assert run.baseline.average_power_w == 4
    assert run.transformed is not None
    assert run.transformed.energy_j == 3600
    assert report(with_transformed=False).for_run(1).transformed is None


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, "10", None])
def test_steps_must_be_a_positive_whole_number(steps: object) -> None:
    with pytest.raises(InputError, match="steps"):
        report().for_run(steps)  # type: ignore[arg-type]


def formats(full: CostReport) -> dict[str, str]:
    return {
        "table": full.table(),
        "json": full.to_json(),
        "csv": full.to_csv(),
        "md": full.to_markdown(),
        "latex": full.to_latex(),
        "html": to_html(full),
    }


@pytest.mark.parametrize("kind", ["table", "json", "csv", "md", "latex", "html"])
@pytest.mark.parametrize("with_transformed", [True, False])
def test_every_format_states_basis_board_assumptions_and_what_is_missing(kind: str, with_transformed: bool) -> None:
    text = formats(report(with_transformed=with_transformed, odd=True))[kind]
    for needed in (BASIS, "cross-entropy", "assumed", "odd", "no formula"):
        assert needed in text


def test_json_round_trip(tmp_path: Path) -> None:
    whole = made_up(hostile=HOSTILE).with_run(steps=10)
    for full in (report(), report(with_transformed=False), report(odd=True), whole):
        text = full.to_json(tmp_path / "r.json")
        assert CostReport.from_json(text) == full
        assert CostReport.from_json(tmp_path / "r.json") == full
        assert CostReport.from_json(str(tmp_path / "r.json")) == full
    data = json.loads(text)
    assert data["schema"] == "e2pass/cost-report/2"
    assert data["baseline"]["totals"]["energy_j"] == whole.baseline.energy_j
    assert [stage["techniques"][-1] for stage in data["stages"]] == ["smd", "slu", "bits", "psg"]
    assert data["run"]["steps"] == 10


@pytest.mark.parametrize(
    "text", ["{", "{}", '{"schema": "e2pass/cost-report/9"}', '{"schema": "e2pass/cost-report/2"}']
)
def test_text_that_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="cost report"):
        CostReport.from_json(text)


def test_csv_lines_add_up(tmp_path: Path) -> None:
    full = report(odd=True)
    text = full.to_csv(tmp_path / "r.csv")
    assert (tmp_path / "r.csv").read_bytes().decode() == text
    lines = list(csv.DictReader(io.StringIO(text)))
    base = [line for line in lines if line["step"] == "baseline"]
    assert [line["status"] for line in base] == ["priced"] * 3 + ["free", "unpriced"]
    rows = [line for line in base if line["status"] == "priced"]
    for column, total in (("energy_j", 5), ("time_s", 1.25), ("macs", 25), ("dram_bytes", 20), ("energy_dram_j", 2.5)):
        assert math.fsum(float(line[column]) for line in rows) == total
    assert {line["basis"] for line in lines} == {BASIS}
    assert base[-1]["energy_j"] == ""  # not 0: it has no price


def test_markdown_tables_are_rectangular() -> None:
    text = report(odd=True).to_markdown()
    for block in text.split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.replace("\\|", "").count("|") for line in rows}) <= 1
    assert "| energy | 5 J | 500 mJ | 90.0% |" in text
    assert "no formula \\| for this" in text


def test_latex_is_escaped_and_balanced() -> None:
    text = made_up(hostile=f"[1]\n{HOSTILE}").to_latex()
    lines = [line for line in text.splitlines() if not line.startswith("%")]
    body = "\n".join("{" if line.lstrip().startswith(r"\resizebox") else line for line in lines)
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == text.count(r"\midrule") > 6
    bare = re.sub(r"\\[&%$#_{}]|\\text\w+\{\}", "", body)
    assert bare.count("{") == bare.count("}")
    assert not set(bare) & set("$%#_^~<>")
    for table in re.findall(r"\\toprule(.*?)\\bottomrule", bare, re.S):
        rows = [line for line in table.splitlines() if line.endswith(r"\\")]
        assert len({row.count("&") for row in rows}) == 1
        assert not any(row.lstrip().startswith("[") for row in rows)  # it would be an option of the line break above


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_latex_compiles_and_fits_the_page(tmp_path: Path) -> None:
    whole = made_up(hostile=f"[1]\n{HOSTILE}").with_run(steps=10)
    preamble = "\\documentclass{article}\\usepackage{booktabs,graphicx}\\begin{document}\n"
    (tmp_path / "report.tex").write_text(f"{preamble}{whole.to_latex()}\\end{{document}}\n", encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "report.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "report.pdf").stat().st_size > 0
    assert "Overfull" not in done.stdout


def test_names_from_the_model_are_text_in_tables() -> None:
    whole = made_up(hostile="[bold]x[/bold]|`y`")
    assert "[bold]x[/bold]|`y`" in whole.table(width=200)
    assert r"\[bold\]x\[/bold\]\|\`y\`" in whole.to_markdown()


def test_a_run_in_epochs() -> None:
    full = made_up()  # batches of 8
    assert full.for_run(epochs=3, dataset_size=17) == full.for_run(steps=9)
    shown = full.with_run(epochs=3, dataset_size=17)
    assert shown.run == full.for_run(9)
    for text in formats(shown).values():
        assert "9 nominal steps" in text or '"steps": 9' in text or text.startswith("basis")
    for wrong in ({}, {"epochs": 3}, {"steps": 1, "epochs": 3, "dataset_size": 9}, {"epochs": 0, "dataset_size": 9}):
        with pytest.raises(InputError, match=r"steps|epochs"):
            full.for_run(**wrong)
    with pytest.raises(InputError, match="batch size"):
        report().for_run(epochs=1, dataset_size=8)


def test_a_pivot_adds_up_and_refuses_unknown_dimensions() -> None:
    step = made_up().baseline
    for by in ((), ("layer",), ("phase", "technique"), ("layer", "block", "phase", "technique")):
        cells = pivot(step, *by)
        assert math.fsum(c.total_j for c in cells) == pytest.approx(step.energy_j)
        assert math.fsum(c.traffic_bytes[step.dram] for c in cells) == pytest.approx(step.dram_bytes)
        assert sum(c.rows for c in cells) == len(step.rows)
        assert len({c.key for c in cells}) == len(cells)
    with pytest.raises(InputError, match="colour"):
        pivot(step, "colour")


def test_roofline_points_lie_under_the_roof() -> None:
    full = made_up()
    assert full.ceilings is not None
    for points in full.roofline().values():
        assert points
        for point in points:
            roof = min(max(full.ceilings.macs_per_s.values()), full.ceilings.dram_bytes_per_s * point.macs_per_byte)
            assert point.macs_per_s <= roof * (1 + 1e-9)


def test_the_waterfall_runs_from_the_baseline_to_the_transformed_step() -> None:
    full = made_up()
    assert full.transformed is not None
    assert [bar.technique for bar in full.waterfall] == ["SMD", "SLU", "low precision", "PSG"]
    assert full.waterfall[0].before == full.baseline.totals
    for bar, following in itertools.pairwise(full.waterfall):
        assert bar.after == following.before
    assert full.waterfall[-1].after.energy_j == pytest.approx(full.transformed.energy_j)
    assert full.waterfall[0].after.energy_j == pytest.approx(full.baseline.energy_j / 2)


def test_comparison(tmp_path: Path) -> None:
    a, b = made_up(), made_up(layers=5)
    a.to_json(tmp_path / "a.json")
    found = compare(tmp_path / "a.json", b)
    assert found.which == "transformed"
    assert a.transformed is not None
    assert b.transformed is not None
    assert found.energy_ratio == pytest.approx(b.transformed.energy_j / a.transformed.energy_j)
    text = found.table()
    assert "layer4" in text
    assert BASIS in text
    assert json.loads(found.to_json(tmp_path / "c.json"))["energy_ratio"] == found.energy_ratio
    assert "| energy |" in found.to_markdown()
    same = compare(a, a)
    assert same.energy_ratio == 1
    assert same.assumptions == {}
    plain = compare(report(with_transformed=False), report())
    assert plain.which == "baseline"
    assert plain.energy_ratio == 1
    with pytest.raises(InputError, match="no transformed step"):
        compare(report(with_transformed=False), report(), "transformed")
    with pytest.raises(InputError, match="which"):
        compare(a, b, "both")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="nowhere"):
        compare(tmp_path / "nowhere.json", b)


def test_the_rich_table_is_the_text_table() -> None:
    console = Console(file=io.StringIO(), width=120, color_system=None)
    console.print(report())
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == report().table()
    assert max(map(len, report().table(width=90).splitlines())) <= 90


@pytest.mark.parametrize("method", ["to_json", "to_csv", "to_markdown", "to_latex"])
def test_writing_is_all_or_nothing(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "report"
    target.write_text("before", encoding="utf-8")
    with pytest.raises(InputError, match="nowhere"):
        getattr(report(), method)(tmp_path / "nowhere" / "report")

    def full_disk(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full_disk)
        with pytest.raises(InputError, match="No space"):
            getattr(report(), method)(target)
    assert [p.name for p in tmp_path.iterdir()] == ["report"]
    assert target.read_text(encoding="utf-8") == "before"
    text = getattr(report(), method)(target)
    assert target.read_bytes().decode() == text
    assert [p.name for p in tmp_path.iterdir()] == ["report"]


def test_the_fpga_model_is_a_cost_model() -> None:
    model: CostModel = FpgaCostModel("zedboard")
    step = price_step([op("a", "aten.relu.default")], model)
    assert step.dram == "ddr3"
    assert step.dram_bytes == 48
    full = CostReport(model.name, step, sources=model.sources())
    assert "zedboard" in full.table()
    assert "data sheet" in full.to_json()


def test_no_word_is_broken_in_80_columns() -> None:
    """Narrower gaps make room; the widest table, of phase, technique and place, is the exception."""
    report = e2pass.analyze(e2pass.models.resnet(8), torch.randn(4, 3, 16, 16), config="e2train")
    buffer = io.StringIO()
    Console(file=buffer, width=80, color_system=None).print(report)
    shown = buffer.getvalue().split("By phase, technique and place")[0]
    words = set(shown.split())
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert {"forward", "backward", "baseline", "transformed", "technique"} <= words
    assert not words & {"forwar", "d", "baseli", "ne", "transf", "transforme", "ormed", "techni", "que"}
