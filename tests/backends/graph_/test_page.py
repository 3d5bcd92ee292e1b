"""The page of a training graph, in a real browser."""

from __future__ import annotations

import hashlib
import json
import re
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import e2pass
from e2pass.backends.graph.page import to_html
from e2pass.backends.graph.page.data import page_data, to_json
from e2pass.models import resnet
from e2pass.report import si
from e2pass.step.graph import TrainingGraph
from tests.browser import Browser
from tests.zoo import ZOO, vector_residual

VENDOR = Path(__file__).resolve().parents[3] / "backends" / "graph" / "page" / "vendor"
# No double quotes and backslashes: torch.fx itself generates broken code from those.
HOSTILE = "</script><script>hacked=1</script><img src=x onerror='hacked=2'>&lt;{b}|%"
ENTER, ESCAPE = "\ue007", "\ue00c"


@pytest.fixture(scope="module")
def graph() -> TrainingGraph:
    torch.manual_seed(0)
    layers = OrderedDict(
        {
            "stem": nn.Linear(12, 16),
            "plain": vector_residual(16),
            HOSTILE: vector_residual(16),
            "head": nn.Linear(16, 4),
        }
    )
    return e2pass.transform(nn.Sequential(layers), torch.zeros(4, 12), [None, None]).graph


@pytest.fixture(scope="module")
def file(graph: TrainingGraph, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "step.html"
    graph.to_html(path)
    return path


@pytest.fixture
def opened(file: Path, browser: Browser) -> Browser:
    browser.console()
    browser.open(file)
    browser.driver.set_script_timeout(20)
    wait = """const done = arguments[0], timer = setInterval(() => {
        if (document.getElementById("step").dataset.ready) { clearInterval(timer); done(true); } }, 20);"""
    assert browser.driver.execute_async_script(wait)
    return browser


def boxes(browser: Browser) -> dict[str, str]:
    """Label of every box in the drawing, by its id."""
    script = """return Object.fromEntries([...document.querySelectorAll("#step-drawing g.box")].map(
        (box) => [box.id, [...box.querySelectorAll("text")].map((t) => t.textContent.trim()).join("|")]))"""
    return dict(browser.run(script))


def labels(browser: Browser, half: str) -> list[str]:
    """Names of the closed groups of one half, from top to bottom."""
    script = """return [...document.querySelectorAll("#step-drawing g.closed")]
        .filter((box) => box.id.endsWith(arguments[0]))
        .sort((a, b) => a.getBoundingClientRect().top - b.getBoundingClientRect().top)
        .map((box) => box.querySelector("text").textContent.trim())"""
    return list(browser.run(script, half))


def middle(browser: Browser, element: str) -> tuple[float, float]:
    script = """const at = document.getElementById(arguments[0]).getBoundingClientRect();
        return [at.left + at.width / 2, at.top + at.height / 2]"""
    x, y = browser.run(script, element)
    return x, y


def double_click(browser: Browser, element: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(browser.driver).double_click(browser.find(f"#{element}")).perform()


def box_of(browser: Browser, name: str, half: str) -> str:
    return next(i for i, label in boxes(browser).items() if label.split("|")[0] == name and i.endswith(half))


def test_it_opens_without_errors_and_loads_nothing(opened: Browser) -> None:
    assert opened.console() == []
    assert opened.run("return performance.getEntriesByType('resource').length") == 0
    assert "modelled, not measured" in opened.find("main").text
    assert opened.run("return typeof hacked") == "undefined"
    assert opened.run("return document.querySelectorAll('img').length") == 0


def test_forward_stands_beside_backward_beside_update(opened: Browser) -> None:
    forward = labels(opened, "f")
    assert forward[0] == "(batch)"
    assert forward[1:3] == ["stem", "plain.body"]
    assert forward[-2:] == ["head", "(loss)"]
    assert labels(opened, "b") == forward[1:-1], "backward is laid out from the bottom up"
    for name in ("stem", "plain.body", "head"):
        columns = [middle(opened, box_of(opened, name, half)) for half in "fbu"]
        assert columns[0][0] < columns[1][0] < columns[2][0], name
        assert max(y for _, y in columns) - min(y for _, y in columns) < 3, name


def test_double_clicks_open_and_close_a_module(opened: Browser) -> None:
    before = boxes(opened)
    double_click(opened, box_of(opened, "plain.body", "f"))
    after = boxes(opened)
    assert {"1", "3"} <= {label.split("|")[0] for label in after.values()}
    assert "plain.body" not in {label.split("|")[0] for label in after.values()}
    assert opened.run("return document.querySelectorAll('#step-drawing g.open').length") == 3  # one in each column
    opened.find("#step-home").click()
    assert boxes(opened) == before
    assert opened.console() == []


def test_the_tree_opens_down_to_operations(opened: Browser) -> None:
    for name in ("plain.body", "1"):
        opened.find(f"button[aria-label='Open {name}']").click()
    shown = [label for i, label in boxes(opened).items() if i.startswith("n")]
    assert any(label.startswith("addmm|") for label in shown)
    assert any("psg.msb" in label for label in shown)
    assert not any(label.startswith("getitem") for label in shown)
    opened.find("button[aria-label='Close plain.body']").click()
    assert not [i for i in boxes(opened) if i.startswith("n")]


def test_search_finds_and_reveals_and_the_cost_is_that_of_the_report(opened: Browser, graph: TrainingGraph) -> None:
    (product,) = [n for n in graph.select(region="trunk_0").nodes if n.site.op == "aten.addmm.default"]
    search = opened.find("#step-search")
    search.send_keys("addmm stem")
    hits = opened.all("#step-hits button b")
    assert [hit.text for hit in hits] == [product.name]
    search.send_keys(ENTER)
    details = opened.find("#step-details").text
    row = graph.costs[product.name]
    assert opened.find("[data-figure=energy]").text.startswith(f"{_three(row.total_j)} ")
    assert opened.find("[data-figure=formula]").text == row.formula
    assert product.site.layer in details
    assert "made by\nlower" in details
    assert "change\nreplaced: reads %trunk_0/" in details
    assert "produces\nf32[4, 16]" in details
    selected = opened.run("return [...document.querySelectorAll('#step-drawing g.selected')].map((g) => g.textContent)")
    assert len(selected) == 1
    assert "addmm" in selected[0]
    levels = opened.all("#step-details .levels summary")
    assert [level.text.split()[0] for level in levels] == [k for k, v in row.energy_j.items() if v > 0]
    levels[0].click()
    key = opened.find("#step-details .sources code").text
    assert graph.info.sources[key] in opened.find("#step-details .sources").text
    search.send_keys(ESCAPE)
    assert not opened.find("#step-hits").is_displayed()
    assert opened.console() == []


def _three(value: float) -> str:
    """Three significant digits, as JavaScript writes them."""
    number = float(si(float(f"{value:.3g}"), "").split()[0])
    return f"{number:g}"


def test_neighbours_lead_on(opened: Browser, graph: TrainingGraph) -> None:
    opened.find("#step-search").send_keys("data/loss-target", ENTER)
    assert opened.find("#step-details h2").text == "data/loss-target"
    assert "free: it arrives in off-chip memory" in opened.find("#step-details").text
    readers = [button.text for button in opened.all("#step-details .links button")]
    assert readers == ["data/smd-drop", *graph.readers("data/loss-target")]
    opened.all("#step-details .links button")[-1].click()
    assert opened.find("#step-details h2").text == readers[-1]


def test_a_click_on_a_box_shows_the_module(opened: Browser, graph: TrainingGraph) -> None:
    opened.find(f"#{box_of(opened, 'stem', 'b')}").click()
    details = opened.find("#step-details").text
    assert details.startswith("stem\n")
    sums = [
        n for n in graph.nodes if not n.site.layer and any(graph[r].site.layer == "stem" for r in graph.readers(n.name))
    ]
    members = [*graph.select(path="stem").nodes, *(n for n in sums if n.site.region == "gradient_sum")]
    energy = sum(graph.costs[n.name].total_j for n in members if n.name in graph.costs)
    assert opened.find("[data-figure=energy]").text.startswith(f"{_three(energy)} ")


@pytest.mark.parametrize("mode", ["energy", "time", "phase", "change"])
def test_colours(opened: Browser, mode: str) -> None:
    fills = "return [...document.querySelectorAll('#step-drawing g.box path')].map((p) => p.getAttribute('fill'))"
    before = opened.run(fills)
    opened.find(f"#step-colour option[value={mode}]").click()
    after = opened.run(fills)
    if mode in ("phase", "change"):
        assert {"phase": "dx", "change": "replaced"}[mode] in opened.find("#step-legend").text
    else:
        assert len(set(after)) > 2 >= len(set(before))
    assert opened.console() == []


def test_dark_and_light_can_be_read(opened: Browser) -> None:
    """What the reader prefers holds for drawing and charts too, and every text keeps its contrast."""
    paper = "return getComputedStyle(document.querySelector('#step .stage')).backgroundColor"
    box = "return document.querySelector('#step-drawing g.box path').getAttribute('fill')"
    axis = """const chart = echarts.getInstanceByDom(document.querySelector("#cost .chart"));
        return chart.getOption().xAxis[0].axisLabel.color"""
    found = {}
    opened.find("button[aria-label='Open stem']").click()
    opened.find(f"#{next(i for i in boxes(opened) if i[0] == 'n')}").click()
    try:
        for scheme in ("light", "dark"):
            opened.prefer(scheme)
            for mode in ("technique", "energy"):
                opened.find(f"#step-colour option[value={mode}]").click()
                assert opened.faint() == [], (scheme, mode)
            found[scheme] = {opened.run(paper), opened.run(box), opened.run(axis)}
    finally:
        opened.prefer("")
    assert len(found["light"] | found["dark"]) == 6
    assert opened.console() == []


def test_a_hostile_name_is_a_name(opened: Browser) -> None:
    assert any(label.startswith("</script><script>") for label in boxes(opened).values())
    opened.find("#step-search").send_keys("hacked=2", ENTER)
    assert HOSTILE in opened.find("#step-details").text
    assert opened.run("return typeof hacked") == "undefined"
    assert opened.run("return document.querySelectorAll('img').length") == 0
    assert opened.console() == []


def test_reasons_and_the_cost_report_are_on_the_page(opened: Browser) -> None:
    text = opened.find("#step .tables").text
    assert "Residual blocks" in text
    assert "2 found, 2 gated" in text
    assert re.search(r"stem\.bias no it has one dimension .*, which keeps full precision", text)
    assert opened.run("return document.querySelectorAll('#cost .chart canvas').length") == 5


def test_the_page_is_closed_and_escaped_without_a_browser(graph: TrainingGraph, file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert "<img" not in text.partition("<main")[2].rpartition("</main>")[0]
    assert "<script>hacked" not in text
    assert not re.search(r"""<(?:script|link|img)[^>]*(?:src|href)=["']?(?!data:|["'])""", text)
    assert "default-src 'none'" in text
    assert "<title>Training step of Sequential</title>" in to_html(graph.original)


def test_the_data_lose_nothing(graph: TrainingGraph) -> None:
    data: dict[str, Any] = json.loads(to_json(page_data(graph)))
    nodes = data["nodes"]
    assert [
        f"{data['regions'][r]}/{data['names'][n]}" for r, n in zip(nodes["region"], nodes["name"], strict=True)
    ] == [node.name for node in graph.nodes]
    for i, node in enumerate(graph.nodes):
        assert [graph.nodes[j].name for j in nodes["reads"][i]] == list(node.operands)
        assert data["kinds"][nodes["kind"][i]][0] == node.site.op
        assert data["origins"][nodes["origin"][i]] == [node.site.layer, node.line, node.site.block or ""]
    changes = [data["changes"][c] for c in nodes["change"]]
    assert changes.count("added") == len(graph.diff().added)
    assert page_data(graph.select(region="loss"))["changes"] == []
    energy = sum(data["costs"][c][2] for c in nodes["cost"])
    assert energy == pytest.approx(graph.price.energy_j, rel=1e-3)
    assert sum(len(data[table]) for table in ("kinds", "costs")) < len(graph), "what repeats is stored once"


def test_vendored_scripts_are_those_of_the_table() -> None:
    table = dict(re.findall(r"^\| `([^`]+\.js)`.*`([0-9a-f]{64})` \|$", (VENDOR / "README.md").read_text(), re.M))
    assert set(table) == {file.name for file in VENDOR.glob("*.js")}
    for name, digest in table.items():
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == digest
    assert {"viz-js.LICENSE", "panzoom.LICENSE"} <= {file.name for file in VENDOR.iterdir()}


def test_columns_of_a_transformer_stand_in_order(browser: Browser, tmp_path: Path) -> None:
    """Its head reads a weight that the embedding holds, and masks come from the batch: edges against the order."""
    model, inputs = ZOO["gpt2"].make()
    t = e2pass.transform(model, inputs, config=e2pass.Config(smd=None, slu=None, psg=None))
    t.graph.to_html(tmp_path / "step.html")
    browser.console()
    browser.open(tmp_path / "step.html")
    browser.wait(lambda: bool(browser.run("return document.getElementById('step').dataset.ready")))
    assert_in_columns(browser)
    assert labels(browser, "f") == ["(batch)", "transformer", "lm_head", "(loss)"]
    assert labels(browser, "b") == ["transformer", "lm_head"]
    for module in ("transformer", "transformer.h", "transformer.h.0"):
        browser.find(f'.row[title="{module}"] .twist').click()
        browser.wait(lambda module=module: bool(browser.run(OPEN, module)))  # type: ignore[misc]
    chain = ["ln_1", "attn", "ln_2", "mlp", "1", "ln_f", "lm_head"]
    for half in "fb":
        assert [name for name in labels(browser, half) if name in chain] == chain
    browser.find("#step-search").send_keys("addmm", ENTER)
    assert_in_columns(browser)
    browser.find("#step-home").click()
    browser.find(f"#{box_of(browser, 'lm_head', 'b')}").click()
    assert_in_columns(browser)
    assert browser.console() == []


def assert_in_columns(browser: Browser) -> None:
    columns = browser.run(COLUMNS)
    assert [name for name, *_ in columns] == ["forward", "backward", "update"]
    assert all(right <= left for (_, _, right), (_, left, _) in pairwise(columns))


@pytest.mark.slow
def test_whatever_is_open_stands_in_order_and_loses_no_link(browser: Browser, tmp_path: Path) -> None:
    """Graphviz drops an edge that it cannot lay, says so on the console, and knows no order of columns."""
    t = e2pass.transform(resnet(8), torch.randn(4, 3, 32, 32), config=e2pass.Config(smd=None, slu=None, psg=None))
    t.graph.to_html(tmp_path / "step.html")
    browser.console()
    browser.open(tmp_path / "step.html")
    browser.wait(lambda: bool(browser.run("return document.getElementById('step').dataset.ready")))
    data = json.loads(browser.run("return document.getElementById('step-data').textContent"))
    for module in ("bn", "stage1.0", "fc"):
        browser.run("document.getElementById('step-home').click()")
        browser.find(f'.row[title="{module}"] .twist').click()
        browser.wait(lambda module=module: bool(browser.run(OPEN, module)))  # type: ignore[misc]
        assert_in_columns(browser)
        assert set(browser.run(LINKS)) == expected_links(browser, data), module
    assert browser.console() == []


def expected_links(browser: Browser, data: dict[str, Any]) -> set[str]:
    """The link of each operation to what it reads, between the boxes in which the list of modules shows the two."""
    closed = dict(browser.run(CLOSED))
    nodes, picking = data["nodes"], set(data["picking"])
    columns = {"data": "f", "forward": "f", "loss": "f", "update": "u"}
    start: list[int] = []
    box: list[str] = []
    for i, reads in enumerate(nodes["reads"]):
        op, _, phase, *_ = data["kinds"][nodes["kind"][i]]
        start.append(start[reads[0]] if op in picking and reads else i)
        path = ".".join(data["groups"][nodes["group"][i]])
        group = next((g for title, g in closed.items() if path == title or path.startswith(f"{title}.")), None)
        own = f"n{i}" if start[i] == i else box[start[i]]
        box.append(own if group is None else f"g{group}{columns.get(phase, 'b')}")
    pairs = {(box[start[read]], box[i]) for i, reads in enumerate(nodes["reads"]) for read in reads}
    return {f"e_{one}_{other}" for one, other in pairs if one != other}


def test_graphviz_never_reaches_the_console(opened: Browser) -> None:
    """What it cannot lay in curves is drawn in straight lines; what it cannot lay at all is said on the page."""
    drawn, refusal = opened.driver.execute_async_script(LAYOUTS)
    assert drawn == 8
    assert "nonsense" in refusal
    assert opened.console() == []


# For the first graph Graphviz 16.1 says "triangulation failed".
LAYOUTS = """const done = arguments[0];
    const edge = (text) => ({ tail: text[0], head: text[1], attributes: text[2] ? { minlen: 0 } : {} });
    const nodes = (names) => [...names].map((name) => ({ name }));
    const graph = { graphAttributes: { newrank: true },
        edges: ["ab", "ac", "ad0", "bc0", "bd0", "be0", "cd0", "ce"].map(edge),
        subgraphs: [{ name: "cluster_x", subgraphs: [{ name: "cluster_z", nodes: nodes("bcd") }] },
            { name: "cluster_y", nodes: nodes("ae"), graphAttributes: { label: "y" } }] };
    E2Step.layout().then((layout) => {
        const drawn = layout(graph).querySelectorAll("g.edge").length;
        try { layout({ graphAttributes: { layout: "nonsense" } }); done([drawn, "none"]); }
        catch (problem) { done([drawn, problem.message]); }
    });"""
CLOSED = """return [...document.querySelectorAll("#step-tree li[aria-expanded=false]")].map(
    (item) => [item.querySelector(".row").title, item.dataset.group])"""
LINKS = "return [...document.querySelectorAll('#step-drawing g.edge')].map((edge) => edge.id)"
OPEN = """return [...document.querySelectorAll("#step-tree .row")].some((row) => row.title === arguments[0] &&
    row.parentElement.getAttribute("aria-expanded") === "true")"""
COLUMNS = """return [...document.querySelectorAll("#step-drawing g.column")].map((column) => {
    const at = column.querySelector("path, polygon").getBoundingClientRect();
    return [column.querySelector("text").textContent.trim(), at.left, at.right]; }).sort((a, b) => a[1] - b[1])"""
