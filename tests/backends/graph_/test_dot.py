from __future__ import annotations

import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from e2pass.backends.graph.dot import quoted
from e2pass.backends.graph.repeats import Run, find_runs, representatives
from e2pass.errors import InputError
from e2pass.transformed import Transformed

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated - use:DeprecationWarning")  # of pyparsing, by pydot


def _parse(source: str) -> tuple[dict[str, set[str]], set[tuple[str, str]]]:
    """Nodes by cluster label, and edges, as pydot reads them."""
    pydot = pytest.importorskip("pydot")
    (parsed,) = pydot.graph_from_dot_data(source)
    assert parsed.get_type() == "digraph"
    clusters: dict[str, set[str]] = {}
    for cluster in parsed.get_subgraphs():
        names = {node.get_name().strip('"') for node in cluster.get_nodes()}
        clusters[cluster.get_label().strip('"')] = names
    edges = {(e.get_source().strip('"'), e.get_destination().strip('"')) for e in parsed.get_edges()}
    return clusters, edges


def _read(source: str) -> tuple[dict[str, set[str]], set[tuple[str, str]]]:
    """The same by lines: pydot takes many seconds for a whole step."""
    clusters: dict[str, set[str]] = {}
    label = ""
    for line in source.splitlines():
        if found := re.match(r'  subgraph cluster_\d+ \{ label="([^"]*)";$', line):
            label = found[1]
            clusters[label] = set()
        elif found := re.match(r'    "([^"]+)" \[label=', line):
            clusters[label].add(found[1])
    return clusters, set(re.findall(r'^  "([^"]+)" -> "([^"]+)" \[', source, re.MULTILINE))


def test_a_parser_reads_it(transformed: Transformed) -> None:
    part = transformed.graph.select(region="trunk_1")
    source = part.to_dot(collapse=False, results=True)
    clusters, edges = _parse(source)
    assert (clusters, edges) == _read(source)
    assert set().union(*clusters.values()) == {node.name for node in part.nodes}
    assert edges == {(e.source, e.target) for e in part.edges}


def test_the_whole_graph_is_there_on_request(transformed: Transformed) -> None:
    graph = transformed.graph
    clusters, edges = _read(graph.to_dot(collapse=False, results=True))
    assert set().union(*clusters.values()) == {node.name for node in graph.nodes}
    assert edges == {(e.source, e.target) for e in graph.edges}
    assert set(clusters) >= {"data", "loss", "update", "body_1_body forward", "body_1_body backward"}


def test_picking_a_result_is_not_drawn_unless_asked_for(transformed: Transformed) -> None:
    graph = transformed.graph
    clusters, edges = _read(graph.to_dot(collapse=False))
    drawn = set().union(*clusters.values())
    assert {n.name for n in graph.nodes} - drawn == {n.name for n in graph.nodes if n.site.op == "_operator.getitem"}
    assert ("trunk_0/quantize_default", "trunk_0/dequantize_default") in edges  # by way of two pickings


def test_equal_blocks_are_drawn_once(transformed: Transformed) -> None:
    """The first gate continues no state and the last passes none on: body, merge and next gate are twice the same."""
    graph = transformed.graph
    runs = find_runs(graph)
    assert [(run.period, run.count) for run in runs] == [(2, 2)]
    twins = representatives(graph, runs)
    for name, twin in twins.items():
        one, other = graph[name], graph[twin]
        assert (one.site.op, one.outputs, one.tag) == (other.site.op, other.outputs, other.tag)
    clusters, edges = _read(graph.to_dot(results=True))
    drawn = set().union(*clusters.values())
    assert drawn == {node.name for node in graph.nodes} - {name for name, twin in twins.items() if name != twin}
    assert "body_1_body forward  \N{MULTIPLICATION SIGN}2" in clusters
    assert not any(label.startswith("body_2_body") for label in clusters)
    assert edges == {(twins.get(e.source, e.source), twins.get(e.target, e.target)) for e in graph.edges}
    assert "style=dashed" in graph.to_dot()


def test_the_longest_run_of_the_shortest_period_wins() -> None:
    from e2pass.backends.graph import repeats

    assert repeats.runs_in([0, 1, 2, 3, 4, 3, 4, 3, 4, 5]) == [Run(3, 2, 3)]
    assert repeats.runs_in([7, 7, 7, 7]) == [Run(0, 1, 4)]
    assert repeats.runs_in([1, 2, 3]) == []
    assert repeats.runs_in([]) == []


@pytest.mark.parametrize("text", ['"', "\\", "a\\nb", 'a"; b [label="', "\\\\"])
def test_any_text_is_quoted(text: str) -> None:
    clusters, _ = _parse(f"digraph {{ subgraph cluster_0 {{ label={quoted('c')}; n [label={quoted(text)}]; }} }}")
    assert clusters == {"c": {"n"}}


def test_graphviz_draws_it(transformed: Transformed, tmp_path: Path) -> None:
    if shutil.which("dot") is None:
        pytest.skip("Graphviz is not installed")
    path = tmp_path / "step.svg"
    svg = transformed.graph.to_svg(path)
    assert path.read_text(encoding="utf-8") == svg
    root = ElementTree.fromstring(svg)
    titles = {e.text for e in root.iter("{http://www.w3.org/2000/svg}title")}
    assert "update/0.weight" in titles


def test_without_graphviz_the_error_says_what_to_do(transformed: Transformed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match=re.escape("Graphviz is not installed (no `dot` on the path)")):
        transformed.graph.to_svg()
