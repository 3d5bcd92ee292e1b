"""The training step's graph leaves the library as text, networkx and DOT."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import networkx as nx
import pytest
import torch

import e2pass
from e2pass.training_graph import TrainingGraph
from e2pass.transformed import Transformed
from tests.zoo import vector_net, vector_residual

ROOT = Path(__file__).resolve().parent.parent
ATTRIBUTES = {
    "op": str,
    "region": str,
    "layer": str,
    "block": str,
    "phase": str,
    "technique": str,
    "tag": str,
    "probability": float,
    "energy_j": float,
    "time_s": float,
}


def small() -> Transformed:
    return e2pass.transform(vector_net(vector_residual(16), vector_residual(16)), torch.zeros(4, 12), [None, None])


@pytest.fixture(scope="module")
def transformed() -> Transformed:
    return small()


@pytest.fixture(scope="module")
def graph(transformed: Transformed) -> TrainingGraph:
    return transformed.graph


def test_text_is_the_same_in_another_process(graph: TrainingGraph) -> None:
    code = "from tests.test_training_graph import small; print(small().graph.to_text(), end='')"
    other_hashes = {**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=other_hashes, capture_output=True, text=True, check=True
    )
    assert done.stdout == graph.to_text()


def test_text_has_every_region_operation_and_annotation(graph: TrainingGraph) -> None:
    text = graph.to_text()
    for region in graph.forward:
        assert f"region {region} forward\n" in text
        assert f"region {region} backward\n" in text
    for tag in ("bits.x", "bits.w", "bits.grad", "psg.msb", "psg.predict", "psg.select", "psg.sign"):
        assert f"tag={tag}" in text, tag
    assert "slu.gate" in text
    assert "optimizer." in text
    for node in graph.nodes:
        assert f"%{node.name}:" in text or f"%{node.name.rpartition('/')[2]}:" in text, node.name
    assert str(ROOT) not in text
    assert not re.search(r"0x[0-9a-f]{6}", text), "an address is no stable name"


def test_networkx_attributes_are_plain_and_complete(graph: TrainingGraph) -> None:
    plain = graph.to_networkx()
    assert list(plain) == [node.name for node in graph.nodes]
    for name, attributes in plain.nodes(data=True):
        assert {key: type(value) for key, value in attributes.items()} == ATTRIBUTES, name
    assert nx.is_directed_acyclic_graph(plain)
    order = {name: i for i, name in enumerate(plain)}
    assert plain.number_of_edges() > 0
    assert all(order[a] < order[b] for a, b in plain.edges), "an operation stands behind what it reads"
    assert {a["phase"] for _, a in plain.nodes(data=True)} >= {"forward", "dx", "dw", "update"}
    assert {a["technique"] for _, a in plain.nodes(data=True)} >= {"base", "slu", "bits", "psg"}


def test_networkx_survives_json_and_graphml(graph: TrainingGraph) -> None:
    plain = graph.to_networkx()
    text = json.dumps(nx.node_link_data(plain, edges="edges"))
    from_json = nx.node_link_graph(json.loads(text), edges="edges")
    stream = io.BytesIO()
    nx.write_graphml(plain, stream)
    stream.seek(0)
    from_graphml = nx.read_graphml(stream)
    for copy in (from_json, from_graphml):
        assert dict(copy.nodes(data=True)) == dict(plain.nodes(data=True))
        assert set(copy.edges) == set(plain.edges)


def test_networkx_gives_the_expected_executions(transformed: Transformed, graph: TrainingGraph) -> None:
    """Half of the batches are dropped; of the others 40 % of the samples skip a gated block: 0.5 * 0.6."""
    gated = {block.name for block in transformed.blocks if block.gated}
    assert gated
    plain = graph.to_networkx()
    forward = [
        a
        for _, a in plain.nodes(data=True)
        if a["phase"] == "forward" and a["op"].startswith(("aten.mm", "aten.addmm"))
    ]
    inside = [a["probability"] for a in forward if a["region"].startswith("body_")]
    outside = [a["probability"] for a in forward if a["region"].startswith("trunk_")]
    assert len(inside) == 4  # two layers in each of two blocks
    assert len(outside) == 2  # the first layer and the last
    assert inside == pytest.approx([0.3] * 4)
    assert outside == pytest.approx([0.5] * 2)
    assert all(a["energy_j"] > 0 for a in forward)


def test_dot_holds_the_same_nodes_and_edges(graph: TrainingGraph) -> None:
    dot, plain = graph.to_dot(), graph.to_networkx()
    nodes = set(re.findall(r'^    "([^"]+)" \[label=', dot, re.MULTILINE))
    edges = set(re.findall(r'^  "([^"]+)" -> "([^"]+)";$', dot, re.MULTILINE))
    assert nodes == set(plain)
    assert edges == set(plain.edges)
    assert dot.count("{") == dot.count("}")
    assert len(re.findall(r"subgraph cluster_\d+ ", dot)) == len({node.site.region for node in graph.nodes})


@pytest.mark.filterwarnings("ignore:.*deprecated - use:DeprecationWarning")  # of pyparsing, by pydot
def test_dot_is_read_by_a_parser(graph: TrainingGraph) -> None:
    pydot = pytest.importorskip("pydot")
    (parsed,) = pydot.graph_from_dot_data(graph.to_dot())
    assert parsed.get_type() == "digraph"
    clusters = parsed.get_subgraphs()
    found = {node.get_name().strip('"') for cluster in clusters for node in cluster.get_nodes()}
    edges = {(e.get_source().strip('"'), e.get_destination().strip('"')) for e in parsed.get_edges()}
    plain = graph.to_networkx()
    assert found == set(plain)
    assert edges == set(plain.edges)
    assert {cluster.get_label().strip('"') for cluster in clusters} == {node.site.region for node in graph.nodes}


def test_tagged_finds_what_a_technique_inserted(graph: TrainingGraph) -> None:
    psg = list(graph.tagged("psg"))
    assert psg
    # The full weight gradient is the model's own operation; PSG marks it, because it runs only where needed.
    assert {node.tag for node in psg if node.site.technique != "psg"} == {"psg.full"}
    assert len([n for n in psg if n.tag == "psg.sign"]) == 6  # one for each weight matrix
    assert list(graph.tagged("no such technique")) == []


def test_forward_and_backward_are_graph_modules_of_each_region(graph: TrainingGraph) -> None:
    assert set(graph.forward) == set(graph.backward)
    names = {node.site.region for node in graph.nodes}
    assert set(graph.forward) <= names
    for region, half in graph.forward.items():
        ours = {n.name for n in graph.nodes if n.site.region == region}
        held = {n.name for n in [*half.graph.nodes, *graph.backward[region].graph.nodes] if n.op == "call_function"}
        assert {f"{region}/{name}" for name in held} == ours
