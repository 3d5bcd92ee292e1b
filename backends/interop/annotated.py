"""The training step as an ONNX file to look at: every operation with its costs and tags in ``metadata_props``.

Operations keep their own names, in the domains ``aten`` and so on: Netron and Model Explorer show such a file; to run a
step, see ``e2pass.backends.onnx_export``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from e2pass.backends.onnx_export.files import target_path, write_model
from e2pass.cost import TensorSpec
from e2pass.step.graph import TrainingGraph
from e2pass.step.node import GraphNode

_STORED = {
    ("i64", 64): ir.DataType.INT64,
    ("i32", 32): ir.DataType.INT32,
    ("f16", 16): ir.DataType.FLOAT16,
    ("bf16", 16): ir.DataType.BFLOAT16,
    ("b8", 1): ir.DataType.BOOL,
}
_TYPES = {64: ir.DataType.DOUBLE, 32: ir.DataType.FLOAT, 16: ir.DataType.INT16, 8: ir.DataType.INT8}


def write_annotated(graph: TrainingGraph, path: str | Path) -> Path:
    """Write the training step with modelled costs, tags, phases, origins and probabilities on every node.

    Raises:
        InputError: If no file can be written there.
        ExportError: If the ONNX checker refuses the file.
    """
    path = target_path(path)
    values: dict[str, list[ir.Value]] = {}
    nodes = []
    for node in graph.nodes:
        nodes.append(_node(graph, node, values))
    read = {operand for node in graph.nodes for operand in node.operands}
    ends = [v for name, results in values.items() if name not in read for v in results]
    opsets = {n.domain: 1 for n in nodes} | {"": 18}
    made = ir.Graph([], ends, nodes=nodes, name="training_step", opset_imports=opsets)
    info = graph.info
    model = ir.Model(made, ir_version=10)
    model.metadata_props.update(
        {
            "model": info.model,
            "board": info.board,
            "batch_size": str(info.batch_size),
            "costs": "modelled, expected per nominal step",
        }
    )
    write_model(model, path, runs=False)
    return path


def _node(graph: TrainingGraph, node: GraphNode, values: dict[str, list[ir.Value]]) -> ir.Node:
    domain, _, operator = node.site.op.partition(".")
    operands = [values[o][0] for o in node.operands if o in values]
    made = ir.Node(
        domain, re.sub(r"\W+", "_", operator or domain), operands, num_outputs=max(1, len(node.outputs)), name=node.name
    )
    for index, value in enumerate(made.outputs):
        value.name = f"{node.name}:{index}"
    stored = node.dtypes or ("",) * len(node.outputs)
    for value, spec, kind in zip(made.outputs, node.outputs, stored, strict=False):
        value.type, value.shape = ir.TensorType(_type(spec, kind)), ir.Shape(spec.shape)
    values[node.name] = list(made.outputs)
    made.metadata_props.update(properties(graph, node))
    return made


def _type(spec: TensorSpec, stored: str) -> ir.DataType:
    """The type as stored where all of its bits count, else the narrowest one that holds the codes of the true width."""
    if (stored, spec.bits) in _STORED:
        return _STORED[stored, spec.bits]
    return _TYPES.get(spec.bits, ir.DataType.INT8 if spec.bits < 8 else ir.DataType.INT16)


def properties(graph: TrainingGraph, node: GraphNode) -> dict[str, str]:
    """What is known about an operation, as text; costs are expected ones per nominal step."""
    site, cost = node.site, graph.costs.get(node.name)
    found: dict[str, Any] = {
        "phase": site.phase, "technique": site.technique, "tag": node.tag, "region": site.region,
        "layer": site.layer, "block": site.block, "line": node.line, "made_by": node.made_by,
        "bits": " ".join(str(o.bits) for o in node.outputs), "probability": f"{node.probability(graph.rates):.4g}",
    }  # fmt: skip
    if cost is not None:
        found |= {"energy_j": f"{cost.total_j:.6g}", "time_s": f"{cost.time_s:.6g}", "macs": f"{cost.macs:.6g}"}
        found["formula"] = cost.formula
    elif node.name in graph.without_cost:
        found["cost"] = f"none: {graph.without_cost[node.name].reason}"
    return {f"e2pass.{key}": str(value) for key, value in found.items() if value not in (None, "")}


def load_properties(path: str | Path) -> dict[str, dict[str, str]]:
    """The properties of every node of an annotated file, by the node's name."""
    return {n.name: {p.key: p.value for p in n.metadata_props} for n in onnx.load(path).graph.node}
