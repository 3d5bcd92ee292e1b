"""The HTML page of a cost report, in a real browser."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from e2pass.backends.html import asset, cost_fragment, page, to_html
from e2pass.report import CostReport
from tests.browser import Browser
from tests.reports import HOSTILE, made_up

VENDOR = Path(__file__).resolve().parents[3] / "backends" / "html" / "vendor"
OPTION = "return echarts.getInstanceByDom(document.getElementById(arguments[0])).getOption()"


@pytest.fixture(scope="module")
def report() -> CostReport:
    return made_up(hostile=HOSTILE).with_run(epochs=2, dataset_size=100)


@pytest.fixture(scope="module")
def opened(report: CostReport, browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Browser:
    file = tmp_path_factory.mktemp("page") / "cost.html"
    to_html(report, file)
    browser.console()
    browser.open(file)
    return browser


def test_it_opens_without_errors_and_loads_nothing(opened: Browser) -> None:
    assert opened.console() == []
    assert opened.run("return performance.getEntriesByType('resource').length") == 0
    assert "modelled, not measured" in opened.find("main").text
    drawn = [box.get_attribute("id") for box in opened.all(".chart")]
    assert drawn == ["cost-waterfall", "cost-alone", "cost-composition", "cost-roofline", "cost-layers"]
    for name in drawn:
        assert opened.run(OPTION, name)["series"], name
        assert opened.run("return document.getElementById(arguments[0]).querySelectorAll('canvas').length", name) == 1


def test_names_from_the_model_are_text(opened: Browser) -> None:
    show = "echarts.getInstanceByDom(document.getElementById(arguments[0]))"
    for chart in ("cost-layers", "cost-roofline"):
        opened.run(f"{show}.dispatchAction({{type: 'showTip', seriesIndex: 0, dataIndex: 0}})", chart)
        assert "window.hacked=1" in opened.find(f"#{chart}").text, chart  # the tooltip shows it, and it is text
    assert opened.run("return window.hacked === undefined")
    names = [cell.text for cell in opened.all("tbody th")]
    assert HOSTILE in names
    assert opened.run("return document.querySelectorAll('img').length") == 0
    assert opened.console() == []


def test_the_waterfall_is_that_of_the_report(opened: Browser, report: CostReport) -> None:
    floors, heights = (s["data"] for s in opened.run(OPTION, "cost-waterfall")["series"])
    tops = [floor + bar["value"] for floor, bar in zip(floors, heights, strict=True)]
    assert report.transformed is not None
    expected = [report.baseline.energy_j, *(max(b.before.energy_j, b.after.energy_j) for b in report.waterfall)]
    assert tops == pytest.approx([*expected, report.transformed.energy_j])


def test_stacks_of_the_layers_add_up_in_every_view(opened: Browser, report: CostReport) -> None:
    select = opened.find("select[data-chart-view='cost-layers']")
    views = [option.text for option in select.find_elements("css selector", "option")]
    assert views == [f"{step} by {part}" for part in ("phase", "technique", "place") for step in report.steps]
    for view in views:
        opened.run("arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('change'))", select, view)
        series = opened.run(OPTION, "cost-layers")["series"]
        whole = report.steps[view.partition(" ")[0]].energy_j
        assert sum(sum(s["data"]) for s in series) == pytest.approx(whole), view
    assert opened.console() == []


def test_tables_sort_by_number_on_click_and_enter(opened: Browser) -> None:
    table = next(t for t in opened.all("section.table-box") if t.find_element("css selector", "h2").text == "By layer")
    heading = table.find_elements("css selector", "thead th")[1]

    def values() -> list[float]:
        cells = table.find_elements("css selector", "tbody tr td:nth-child(2)")
        return [float(cell.get_attribute("data-sort")) for cell in cells]

    found = values()
    assert len(set(found)) > 2
    heading.click()
    opened.wait(lambda: values() == sorted(found, reverse=True))
    heading.send_keys("\ue007")  # Enter
    opened.wait(lambda: values() == sorted(found))


def test_a_baseline_alone_has_a_page(browser: Browser, tmp_path: Path) -> None:
    whole = made_up()
    to_html(CostReport(whole.board, whole.baseline), tmp_path / "b.html")
    browser.console()
    browser.open(tmp_path / "b.html")
    assert browser.console() == []
    assert len(browser.all(".chart canvas")) == 3


def test_hundreds_of_layers_fit_into_the_charts(browser: Browser, tmp_path: Path) -> None:
    to_html(made_up(layers=400), tmp_path / "big.html")
    browser.open(tmp_path / "big.html")
    assert len(browser.run(OPTION, "cost-layers")["xAxis"][0]["data"]) == 400
    assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")


def test_two_reports_on_one_page_share_their_assets(browser: Browser, tmp_path: Path) -> None:
    """What another page does with the fragment."""
    text = page("two", [cost_fragment(made_up()), cost_fragment(made_up(), prefix="other")])
    assert text.count("Licensed to the Apache Software Foundation") == 1
    (tmp_path / "two.html").write_text(text, encoding="utf-8")
    browser.console()
    browser.open(tmp_path / "two.html")
    assert browser.console() == []
    assert len(browser.all(".chart canvas")) == 10


def test_the_page_is_escaped_and_closed_without_a_browser(report: CostReport) -> None:
    text = to_html(report)
    assert "<img" not in text.partition("<main")[2].partition("</main>")[0]
    assert "<script>window.hacked" not in text
    assert not re.search(r"""<(?:script|link|img)[^>]*(?:src|href)=["']?(?!data:|["'])""", text)
    assert "default-src 'none'" in text


def test_vendored_scripts_are_those_of_the_table() -> None:
    table = dict(re.findall(r"^\| `([^`]+\.js)`.*`([0-9a-f]{64})` \|$", (VENDOR / "README.md").read_text(), re.M))
    assert set(table) == {file.name for file in VENDOR.glob("*.js")}
    for name, digest in table.items():
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == digest
    assert asset("vendor/sortable.min.js").name == "sortable.min.js"
    assert {"echarts.LICENSE", "echarts.NOTICE", "sortable.LICENSE"} <= {file.name for file in VENDOR.iterdir()}
