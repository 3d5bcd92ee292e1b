"""The training graph as a page for the browser: a hierarchy to open and close, with the cost report below it."""

from __future__ import annotations

from collections.abc import Iterator

from markupsafe import Markup

from e2pass.backends.graph.page.data import page_data, to_json
from e2pass.backends.html import cost_fragment
from e2pass.backends.html.page import Fragment, asset, environment, page
from e2pass.diagnostics import Diagnostic
from e2pass.report import CostReport
from e2pass.step.graph import TrainingGraph

PACKAGE = "e2pass.backends.graph.page"
STYLES = ("static/step.css",)
SCRIPTS = (
    "vendor/viz-global.js",
    "vendor/panzoom.min.js",
    "static/model.js",
    "static/layout.js",
    "static/rows.js",
    "static/columns.js",
    "static/drawing.js",
    "static/panels.js",
    "static/step.js",
)


def to_html(graph: TrainingGraph, report: CostReport | None = None) -> str:
    """Return the graph as a page, with a cost report below it if there is one."""
    fragments = [graph_fragment(graph), *([] if report is None else [cost_fragment(report)])]
    return page(f"Training step of {graph.info.model}", fragments)


def graph_fragment(graph: TrainingGraph) -> Fragment:
    """The graph with its panels, and the tables of blocks and weight gradients, as a piece of a page."""
    body = environment(PACKAGE).get_template("step.html.j2").render(
        info=graph.info,
        count=len(graph),
        data=Markup(to_json(page_data(graph))),
        gradients=list(_gradients(graph)),
    )  # fmt: skip
    styles = (asset("static/theme.css"), *(asset(path, PACKAGE) for path in STYLES))
    return Fragment(Markup(body), styles, tuple(asset(path, PACKAGE) for path in SCRIPTS), wasm=True)


def _gradients(graph: TrainingGraph) -> Iterator[tuple[str, bool, str]]:
    """Each weight, whether its gradient is predicted, and the reason if it is not."""
    found: Iterator[Diagnostic] = graph.info.diagnostics.with_code("E2P410", "E2P411")
    for diagnostic in found:
        predicted = diagnostic.code == "E2P410"
        yield diagnostic.node, predicted, "" if predicted else diagnostic.message.partition(": ")[2]
