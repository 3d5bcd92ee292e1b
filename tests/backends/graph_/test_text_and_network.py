from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import networkx as nx

from e2pass.backends.graph.text import type_text
from e2pass.step.graph import TrainingGraph
from e2pass.transformed import Transformed
from tests.backends.graph_.conftest import small

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests" / "golden" / "training_graph_block.txt"


def test_text_is_the_same_in_another_process() -> None:
    code = "from tests.backends.graph_.conftest import small; print(small(1).graph.to_text(), end='')"
    other_hashes = {**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=other_hashes, capture_output=True, text=True, check=True
    )
    assert done.stdout == small(1).graph.to_text()


def test_text_of_a_block_is_the_golden_one(transformed: Transformed) -> None:
    text = transformed.graph.select(region="body_1_body").to_text()
    if os.environ.get("E2PASS_UPDATE_GOLDEN") == "1":
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text(), "E2PASS_UPDATE_GOLDEN=1 writes it anew"


def test_text_has_every_section_operation_and_annotation(transformed: Transformed) -> None:
    graph = transformed.graph
    text = graph.to_text()
    for region in graph.forward:
        assert f"\nregion {region} forward\n" in text
        assert f"\nregion {region} backward\n" in text
    for section in ("data", "loss", "update"):
        assert f"\n{section}\n" in text
    lines = {m[1]: m[0] for m in re.finditer(r"^%(\S+): .*$", text, re.MULTILINE)}
    assert list(lines) == [node.name for node in graph.nodes]
    for node in graph.nodes:
        line = lines[node.name]
        assert f" = {node.site.op}(" in line
        assert f"pass={node.made_by} " in line
        assert all(f"%{operand}" in line for operand in node.operands)
        assert all(f"@{name}" in line for name in node.state)
        assert (f"tag={node.tag} " in line) == bool(node.tag)
    assert str(ROOT) not in text
    assert not re.search(r"0x[0-9a-f]{6}", text), "an address is no stable name"


def test_types_state_what_is_stored(transformed: Transformed) -> None:
    graph = transformed.graph
    quantized = next(n for n in graph.tagged("bits.x") if n.site.op == "e2pass.quantize.default")
    assert type_text(quantized) == "(i8[4, 12], f32[])"
    assert [(spec.shape, spec.bits) for spec in quantized.outputs] == [((4, 12), 8), ((), 32)]


def test_networkx_attributes_are_plain_and_complete(transformed: Transformed) -> None:
    graph: TrainingGraph = transformed.graph
    plain = graph.to_networkx()
    assert list(plain) == [node.name for node in graph.nodes]
    texts = {"op", "region", "layer", "line", "block", "phase", "technique", "tag", "made_by", "shape", "dtype"}
    kinds = dict.fromkeys(texts | {"bits", "formula"}, "str")
    kinds |= dict.fromkeys(("probability", "energy_j", "time_s", "macs", "dram_bytes"), "float")
    kinds["gate"] = "int"
    for name, attributes in plain.nodes(data=True):
        assert {key: type(value).__name__ for key, value in attributes.items()} == kinds, name
    assert nx.is_directed_acyclic_graph(plain)
    assert {(a, b, d["kind"]) for a, b, d in plain.edges(data=True)} == {
        (e.source, e.target, str(e.kind)) for e in graph.edges
    }
    report = transformed.report()
    assert report.transformed is not None
    assert abs(sum(e for _, e in plain.nodes(data="energy_j")) / report.transformed.energy_j - 1) < 1e-9


def test_networkx_survives_json_and_graphml(transformed: Transformed) -> None:
    plain = transformed.graph.to_networkx()
    text = json.dumps(nx.node_link_data(plain, edges="edges"))
    from_json = nx.node_link_graph(json.loads(text), edges="edges")
    stream = io.BytesIO()
    nx.write_graphml(plain, stream)
    stream.seek(0)
    from_graphml = nx.read_graphml(stream)
    for copy in (from_json, from_graphml):
        assert dict(copy.nodes(data=True)) == dict(plain.nodes(data=True))
        assert {e: d["kind"] for *e, d in copy.edges(data=True) for e in [tuple(e)]} == {
            e: d["kind"] for *e, d in plain.edges(data=True) for e in [tuple(e)]
        }
