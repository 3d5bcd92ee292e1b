"""Files for neighbouring tools, against their own loaders' rules and the graph they were written from."""

from __future__ import annotations

import csv
import json
import math
import re
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import yaml
from torch import nn

import e2pass
from e2pass.backends.interop import write_annotated, write_model_explorer, write_scalesim, write_zigzag
from e2pass.backends.interop.products import step_products
from e2pass.errors import InputError
from e2pass.transformed import Transformed
from tests.zoo import ZOO

# From ZigZag 3.9's WorkloadValidator.
EQUATION = r"^O(\[\w+\])+\s*\+?\s*=\s*\w(\[\w+\])+\s*[*+]\s*\w(\[(?:\w+)?\])+\s*$"
RELATION = r"^(\w+)\s*=\s*(?:(\w+)\s*\*\s*)?(\w+)\s*\+\s*(?:(\w+)\s*\*\s*)?(\w+)$"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.body(x)
        return out


@pytest.fixture(scope="module")
def t() -> Transformed:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), Block(), nn.Conv2d(8, 8, 3, stride=2), nn.Flatten())
    return e2pass.transform(model.append(nn.Linear(8 * 9, 5)), torch.randn(4, 3, 16, 16), config="e2train")


def products_by_hand(batch: int) -> dict[str, int]:
    """MACs of one execution of each kind: every layer forward, dX but of the first, dW, and a predictor for each dW."""
    layers = [8 * 8 * 8 * 27, 8 * 8 * 8 * 9, 8 * 8 * 8 * 8, 3 * 3 * 8 * 72, 72 * 5]
    total = batch * sum(layers)
    return {"forward": total, "dx": total - batch * layers[0], "dw": total, "predictor": total}


def test_products_have_the_macs_of_every_layer(t: Transformed) -> None:
    found: dict[str, float] = {}
    for product in step_products(t.graph):
        if not product.node.tag.startswith("slu"):
            found[product.kind] = found.get(product.kind, 0.0) + product.nest.macs
    assert found == products_by_hand(4)


def test_zigzag_workload_follows_its_schema(t: Transformed, tmp_path: Path) -> None:
    layers: list[dict[str, Any]] = yaml.safe_load(write_zigzag(t.graph, tmp_path / "w.yaml").read_text())
    products = step_products(t.graph)
    assert [layer["id"] for layer in layers] == list(range(len(products)))
    for layer, product in zip(layers, products, strict=True):
        assert layer["operator_type"] in ("Conv", "Gemm")
        assert re.match(EQUATION, layer["equation"])
        assert all(re.match(RELATION, relation) for relation in layer["dimension_relations"])
        assert math.prod(layer["loop_sizes"]) == product.nest.macs
        assert len(layer["loop_dims"]) == len(layer["loop_sizes"])
        letters = set(re.findall(r"\[(\w+)\]", layer["equation"])) - {"ix", "iy"}
        assert letters == {dim.lower() for dim in layer["loop_dims"] if dim.lower() in letters}
        assert len(layer.get("padding", [])) == len(layer.get("pr_loop_dims", []))
    widths = {
        layer["name"].partition(":")[0]: layer["operand_precision"] for layer in layers if "gate" not in layer["name"]
    }
    assert (widths["forward"]["I"], widths["forward"]["W"]) == (8, 8)
    assert sorted((widths["dw"]["I"], widths["dw"]["W"])) == [8, 16]
    assert sorted((widths["predictor"]["I"], widths["predictor"]["W"])) == [4, 10]


def test_scalesim_topology_has_the_same_macs(t: Transformed, tmp_path: Path) -> None:
    with write_scalesim(t.graph, tmp_path / "t.csv").open() as file:
        header, *rows = csv.reader(file)
    assert header == ["Layer", "M", "N", "K", ""]
    names = [row[0] for row in rows]
    assert len(set(names)) == len(names)
    repeats = [int(m[1]) if (m := re.search(r"_x(\d+)$", name)) else 1 for name in names]
    macs = sum(r * math.prod(map(int, row[1:4])) for r, row in zip(repeats, rows, strict=True))
    assert macs == sum(p.nest.macs for p in step_products(t.graph))
    assert 8 in repeats  # the depthwise convolution


def test_fused_attention_is_its_matrix_products(tmp_path: Path) -> None:
    model, inputs = ZOO["vit"].make()
    graph = e2pass.transform(model, inputs, config="slu").graph
    fused = [n for n in graph.nodes if "scaled_dot_product" in n.site.op]
    macs = 17 * 17 * 16 * 2 * graph.info.batch_size  # scores of 17 tokens, 2 heads 16 wide
    for node in fused:
        found = [p.nest.macs for p in step_products(graph) if p.node is node]
        assert found == [macs] * (5 if "backward" in node.site.op else 2)
    assert len(fused) == 4


def test_annotated_file_holds_every_operation_with_its_cost(t: Transformed, tmp_path: Path) -> None:
    path = write_annotated(t.graph, tmp_path / "a.onnx")
    model = onnx.load(path)
    onnx.checker.check_model(model)
    found = {n.name: {p.key: p.value for p in n.metadata_props} for n in model.graph.node}
    assert list(found) == [n.name for n in t.graph.nodes]
    energy = sum(float(p.get("e2pass.energy_j", 0)) for p in found.values())
    assert energy == pytest.approx(t.graph.price.energy_j, rel=1e-4)
    assert all("e2pass.energy_j" in p or "e2pass.cost" in p for p in found.values())
    assert {"psg.msb", "psg.select", "bits.x"} <= {p.get("e2pass.tag") for p in found.values()}
    readers = {value for n in model.graph.node for value in n.input}
    assert len(readers) > len(found) / 2

    data = json.loads(write_model_explorer(t.graph, tmp_path / "e.json").read_text())
    results = data[model.graph.name]["results"]
    assert set(results) <= set(found)  # names of nodes are their ids in Model Explorer
    assert sum(r["value"] for r in results.values()) == pytest.approx(t.graph.price.energy_j)


def test_annotated_file_has_the_types_of_the_values(t: Transformed, tmp_path: Path) -> None:
    model = onnx.load(write_annotated(t.graph, tmp_path / "step.onnx"))
    found = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.value_info, *model.graph.output)}
    kinds = onnx.TensorProto
    expected = {("i64", 64): kinds.INT64, ("f32", 32): kinds.FLOAT, ("i8", 8): kinds.INT8, ("b8", 1): kinds.BOOL}
    met = set()
    for node in t.graph.nodes:
        for i, (stored, spec) in enumerate(zip(node.dtypes, node.outputs, strict=False)):
            if (stored, spec.bits) in expected:
                assert found[f"{node.name}:{i}"] == expected[stored, spec.bits]
                met.add((stored, spec.bits))
    assert met >= {("i64", 64), ("f32", 32), ("i8", 8)}


def test_bad_targets_are_refused_and_nothing_is_left(t: Transformed, tmp_path: Path) -> None:
    for write in (write_annotated, write_model_explorer, write_scalesim, write_zigzag):
        with pytest.raises(InputError, match="is a folder"):
            write(t.graph, tmp_path)
        with pytest.raises(InputError, match="does not exist; create it first"):
            write(t.graph, tmp_path / "none" / "file")
    with pytest.raises(InputError, match="value 'joy' is not allowed; choose one of energy_j, time_s, macs"):
        write_model_explorer(t.graph, tmp_path / "e.json", value="joy")
    assert list(tmp_path.iterdir()) == []


def test_layers_whose_names_differ_in_signs_only_stay_apart(tmp_path: Path) -> None:
    """``a-b`` and ``a_b`` are two modules, and so are ``Up`` and ``up``; SCALE-Sim's results go by the name."""
    names = ("a-b", "a_b", "a b", "Up", "up")
    model = torch.nn.Sequential(OrderedDict((name, torch.nn.Linear(4, 4)) for name in names))
    graph = e2pass.transform(model, torch.zeros(2, 4), config="neutral").graph
    renamed = [replace(p, name=f"trunk/{name}") for p, name in zip(step_products(graph), names, strict=False)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("e2pass.backends.interop.scalesim.step_products", lambda _: renamed)
        rows = write_scalesim(graph, tmp_path / "topology.csv").read_text().splitlines()[1:]
    layers = [row.split(",")[0] for row in rows]
    assert len(layers) == 5
    assert len({layer.lower() for layer in layers}) == 5
    assert all(layer.isascii() and layer.replace("_", "").isalnum() for layer in layers)
