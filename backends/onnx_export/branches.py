"""Opaque bodies become ONNX ``If`` nodes: gather the open samples, run the body on them, scatter back.

Where no gate is open the other branch returns zeros, and no node of the body runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from e2pass.backends.onnx_export.aten import PlaceOf, decompose, translate
from e2pass.backends.onnx_export.functions import OPSET
from e2pass.backends.onnx_export.opaque import BODIES, DOMAIN, Body

FUNCTIONS = "e2pass.region"
"""Domain of the halves of bodies that are kept as functions."""


def expand_bodies(model: ir.Model, place_of: PlaceOf) -> None:
    """Replace every opaque node of a model's main graph."""
    expansion = _Expansion(model, place_of)
    for node in list(model.graph):
        if node.domain == DOMAIN:
            body = BODIES[node.attributes["body"].as_string()]
            (expansion.forward if node.op_type == "Body" else expansion.backward)(node, body)


class _Expansion:
    def __init__(self, model: ir.Model, place_of: PlaceOf) -> None:
        self.model, self.place_of = model, place_of
        self.saved: dict[str, list[ir.Value]] = {}
        self.conditions: dict[ir.Value, ir.Value] = {}

    def forward(self, node: ir.Node, body: Body) -> None:
        *tensors, mask = _present(node.inputs)
        kinds = body.compiled.halves.forward_inputs
        placeholders = body.forward.graph.find_nodes(op="placeholder")
        results: Any = body.forward.graph.output_node().args[0]
        n_out = len(body.outputs())
        used = [i for i in range(n_out) if _is_used(node.outputs[i])]
        # Saved parameters and buffers need not pass through the branch: they are the values outside.
        outside = {
            p: t for p, t, (kind, _) in zip(placeholders, tensors, kinds, strict=True) if kind not in ("input", "scale")
        }
        wanted = [*(results[i] for i in used), *(r for r in results[n_out:] if r not in outside)]
        opened, closed = _Branch(mask), _Branch(mask)
        given = [
            opened.gather(t, body.region.rows[key] if kind == "input" else 0)
            for t, (kind, key) in zip(tensors, kinds, strict=True)
        ]
        found = self._run(opened, body, "forward", body.forward, given, wanted)
        for position, source in enumerate(wanted):
            if position < len(used):
                found[position] = opened.scatter(found[position], source, body)
                closed.zeros(source, body)
            else:
                closed.empty(source)
        branching = self._branch(node, mask, opened, found, closed)
        _replace([node.outputs[i] for i in used], branching.outputs)
        rest = iter(branching.outputs[len(used) :])
        self.saved[body.region.name] = [outside[r] if r in outside else next(rest) for r in results[n_out:]]
        self.model.graph.remove(node, safe=True)

    def backward(self, node: ir.Node, body: Body) -> None:
        *tangents, mask = _present(node.inputs)
        halves = body.compiled.halves
        results: Any = halves.backward.graph.output_node().args[0]
        used = [i for i in range(len(results)) if _is_used(node.outputs[i])]
        opened, closed = _Branch(mask), _Branch(mask)
        rows = [body.rows(n) for n in halves.backward.graph.find_nodes(op="placeholder")[-len(tangents) :]]
        given = [*self.saved[body.region.name], *(opened.gather(t, k) for t, k in zip(tangents, rows, strict=True))]
        wanted = [results[i] for i in used]
        found = self._run(opened, body, "backward", halves.backward, given, wanted)
        for position, source in enumerate(wanted):
            found[position] = opened.scatter(found[position], source, body)
            closed.zeros(source, body)
        branching = self._branch(node, mask, opened, found, closed)
        _replace([node.outputs[i] for i in used], branching.outputs)
        self.model.graph.remove(node, safe=True)

    def _run(
        self,
        branch: _Branch,
        body: Body,
        half: str,
        module: fx.GraphModule,
        given: Sequence[ir.Value],
        wanted: Sequence[fx.Node],
    ) -> list[ir.Value]:
        """Values of ``wanted``, computed in the branch: by a local function in training, by plain nodes else."""
        unique = list(dict.fromkeys(wanted))
        small = _with_outputs(module, unique)
        arguments = [n.meta["val"] for n in small.graph.find_nodes(op="placeholder")]
        graph = ir.Graph((), (), nodes=(), opset_imports={"": OPSET})
        if body.training:
            name = f"{body.region.name}_{half}"
            function = ir.Function(FUNCTIONS, name, graph=graph, attributes={})
            translate(decompose(small, arguments, self.place_of), self.model, function, self.place_of)
            self.model.functions[function.identifier()] = function
            call = ir.Node(FUNCTIONS, name, list(given), num_outputs=len(unique), name=name)
            branch.nodes.append(call)
            values = list(call.outputs)
        else:
            translate(decompose(small, arguments, self.place_of), self.model, graph, self.place_of)
            values = list(graph.outputs)
            graph.outputs.clear()
            for inner, outer in zip(graph.inputs, given, strict=True):
                inner.replace_all_uses_with(outer)
            nodes = list(graph)
            graph.remove(nodes)
            for inside in nodes:
                inside.name = f"{body.region.name}/{inside.name}"
            branch.nodes.extend(nodes)
        made = dict(zip(unique, values, strict=True))
        return [made[w] for w in wanted]

    def _branch(
        self, node: ir.Node, mask: ir.Value, opened: _Branch, results: Sequence[ir.Value], closed: _Branch
    ) -> ir.Node:
        if mask not in self.conditions:
            peak = ir.node("ReduceMax", [mask], {"keepdims": 0})
            zero = ir.node("Constant", [], {"value": ir.tensor(np.float32(0))})
            above = ir.node("Greater", [peak.outputs[0], zero.outputs[0]])
            self.model.graph.insert_before(node, [peak, zero, above])
            self.conditions[mask] = above.outputs[0]
        made = ir.node(
            "If",
            [self.conditions[mask]],
            {"then_branch": opened.graph("open", results), "else_branch": closed.graph("closed", closed.made)},
            num_outputs=len(results),
            name=f"{node.attributes['body'].as_string()}_{node.op_type}",
        )
        self.model.graph.insert_before(node, made)
        return made


class _Branch:
    """Nodes of one branch."""

    def __init__(self, mask: ir.Value) -> None:
        self.mask = mask
        self.single = mask.shape is not None and mask.shape[0] == 1
        self.nodes: list[ir.Node] = []
        self.made: list[ir.Value] = []
        self._index: ir.Value | None = None

    def op(self, kind: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        node = ir.node(kind, inputs, attributes)
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, value: Any) -> ir.Value:
        return self.op("Constant", value=ir.tensor(np.asarray(value, dtype=np.int64)))

    @property
    def index(self) -> ir.Value:
        """Positions of the open samples, (n,)."""
        if self._index is None:
            self._index = self.op("Squeeze", self.op("NonZero", self.mask), self.constant([0]))
        return self._index

    def gather(self, value: ir.Value, rows: int) -> ir.Value:
        """The rows of the open samples; all where the value does not grow with the batch, or holds one sample."""
        if rows == 0 or self.single:
            return value
        if rows == 1:
            return self.op("Gather", value, self.index, axis=0)
        samples, rest = self._by_sample(value, rows)
        return self.op("Reshape", self.op("Gather", samples, self.index, axis=0), self.constant([-1, *rest]))

    def _by_sample(self, value: ir.Value, rows: int) -> tuple[ir.Value, list[int]]:
        assert value.shape is not None
        rest = [int(d) for d in value.shape[1:]]  # type: ignore[arg-type]
        return self.op("Reshape", value, self.constant([-1, rows, *rest])), rest

    def scatter(self, value: ir.Value, source: fx.Node, body: Body) -> ir.Value:
        """Put the open samples' rows among zeros for the others."""
        rows = body.rows(source)
        if rows == 0 or self.single:
            return value
        rest = list(source.meta["val"].shape[1:])
        if rows > 1:
            value = self.op("Reshape", value, self.constant([-1, rows, *rest]))
        zeros = self._zeros([rows, *rest] if rows > 1 else rest, source.meta["val"].dtype)
        result = self.op("ScatterND", zeros, self.op("Unsqueeze", self.index, self.constant([1])), value)
        return result if rows == 1 else self.op("Reshape", result, self.constant([-1, *rest]))

    def _zeros(self, rest: Sequence[int], dtype: torch.dtype) -> ir.Value:
        """Zeros of shape (samples of the mask, *rest)."""
        shape = self.op("Concat", self.op("Shape", self.mask), self.constant(list(rest)), axis=0)
        return self.op("ConstantOfShape", shape, value=ir.tensor(np.zeros(1, _numpy(dtype))))

    def zeros(self, source: fx.Node, body: Body) -> None:
        """The result of a body that did not run."""
        value, rows = source.meta["val"], body.rows(source)
        if rows == 0:
            made = self.op("Constant", value=ir.tensor(np.zeros(tuple(value.shape), _numpy(value.dtype))))
        else:
            rest = list(value.shape[1:])
            made = self._zeros([rows, *rest] if rows > 1 else rest, value.dtype)
            if rows > 1:
                made = self.op("Reshape", made, self.constant([-1, *rest]))
        self.made.append(made)

    def empty(self, source: fx.Node) -> None:
        """Stands for a saved value that backward will not read."""
        value = source.meta["val"]
        tensor = isinstance(value, torch.Tensor)
        kind = np.zeros([0] * value.dim(), _numpy(value.dtype)) if tensor else np.zeros((), np.int64)
        self.made.append(self.op("Constant", value=ir.tensor(kind)))

    def graph(self, name: str, outputs: Sequence[ir.Value]) -> ir.Graph:
        inside = {v for n in self.nodes for v in n.outputs}
        results: list[ir.Value] = []
        for value in outputs:  # a branch returns values of its own, each once
            fresh = value in inside and value not in results
            results.append(value if fresh else self.op("Identity", value))
        return ir.Graph([], results, nodes=self.nodes, name=name)


def _present(values: Sequence[ir.Value | None]) -> list[ir.Value]:
    return [v for v in values if v is not None]


def _is_used(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _replace(old: Sequence[ir.Value], new: Sequence[ir.Value]) -> None:
    for before, after in zip(old, new, strict=False):
        after.type, after.shape = before.type, before.shape
        before.replace_all_uses_with(after, replace_graph_outputs=True)


def _with_outputs(module: fx.GraphModule, outputs: Sequence[fx.Node]) -> fx.GraphModule:
    """A copy of a graph that computes some of its nodes and nothing else."""
    graph = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(module.graph, nodes)
    graph.output([nodes[n] for n in outputs])
    for old, new in nodes.items():
        new.meta = dict(old.meta)
    graph.eliminate_dead_code()
    return fx.GraphModule(module, graph)


def _numpy(dtype: torch.dtype) -> Any:
    return torch.empty(0, dtype=dtype).numpy().dtype
