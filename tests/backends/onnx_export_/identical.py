"""The halves of lowered regions in onnxruntime on the operands that PyTorch had: the same inputs and integer codes.

Two correct runs of a quantized step differ: where a value lies within rounding error of the middle between two codes,
each may take another, and everything behind it differs by more than rounding. So whole steps cannot be compared sign by
sign. Here every quantizer's result is replaced by the codes that PyTorch found, for both; what is left between them is
continuous, but for the selection and the sign, and these are compared with the exact gradient, in double precision.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor, fx

from e2pass.backends.onnx_export.aten import decompose, quiet, translate
from e2pass.backends.onnx_export.files import write_model
from e2pass.lowering.partition import ancestors
from e2pass.lowering.products import LAYOUT_OPS
from e2pass.runtime.region import CompiledRegion
from e2pass.transformed import Transformed

aten = torch.ops.aten
e2 = torch.ops.e2pass
UNIT = 2.0**-24
"""Relative error of one operation in float32."""
_SUMS = (aten.add.Tensor, aten.sum.dim_IntList)


@dataclass
class Recorded:
    """One half of a region in one step.

    Attributes:
        half: What PyTorch ran.
        keys: ``(kind, key)`` of its first outputs.
        arguments: What it was given.
        codes: Codes and scale of each quantizer, in order.
        results: What it returned.
    """

    half: fx.GraphModule
    keys: Sequence[tuple[str, Any]]
    arguments: list[Any]
    codes: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)


class _Recorder(fx.Interpreter):
    """Runs a half and keeps what went in, what its quantizers found, and what came out."""

    def __init__(self, name: str, half: fx.GraphModule, keys: Sequence[tuple[str, Any]], into: dict[str, Recorded]):
        super().__init__(half)
        self.name, self.keys, self.into = name, keys, into

    def __call__(self, *arguments: Any) -> Any:
        given = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
        self.into[self.name] = Recorded(self.module, self.keys, given)  # type: ignore[arg-type]
        results = self.run(*arguments)
        self.into[self.name].results = list(results)
        return results

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if is_quantizer(n):
            self.into[self.name].codes.append(tuple(result))
        return result


def _taking_a_list(run: Callable[..., Any]) -> Callable[[list[Any]], Any]:
    return lambda arguments: run(*arguments)


@contextmanager
def recorded(t: Transformed) -> Iterator[dict[str, Recorded]]:
    """Yields a dict that training steps within fill: ``REGION/forward`` and ``REGION/backward``, of the last step."""
    into: dict[str, Recorded] = {}
    held: list[tuple[CompiledRegion, Any, Any]] = []
    cache = t.model._executable.cache
    assert cache is not None, "nothing is executed lowered"
    for key, entries in cache.entries.items():
        for i, compiled in enumerate(entries):
            held.append((compiled, compiled.forward, compiled.backward))
            halves, name = compiled.halves, f"{key[0]}.{i}"
            forward = _Recorder(f"{name}/forward", halves.forward, halves.forward_outputs, into)
            backward = _Recorder(f"{name}/backward", halves.backward, halves.backward_outputs, into)
            compiled.forward, compiled.backward = forward, _taking_a_list(backward)
    try:
        yield into
    finally:
        for compiled, before, after in held:
            compiled.forward, compiled.backward = before, after


def is_quantizer(node: fx.Node) -> bool:
    return node.target in (e2.quantize.default, e2.quantize_stochastic.default, e2.quantize_running.default)


@dataclass
class Cut:
    """A half whose quantizers' results are inputs.

    Attributes:
        module: The graph; the codes and scales come behind the half's own inputs.
        outputs: Positions of the half's results that it returns, and behind them come, of each quantizer, its own
            codes and scale. Statistics are not among them: no file holds them.
    """

    module: fx.GraphModule
    outputs: list[int]


def cut(record: Recorded) -> Cut:
    """Make the results of quantizers inputs, for those that read them."""
    graph = _copied(record.half.graph)
    last = [n for n in graph.nodes if n.op == "placeholder"][-1]
    made: list[fx.Node] = []
    for node in [n for n in graph.nodes if is_quantizer(n)]:
        for position in (0, 1):
            with graph.inserting_after(last):
                last = graph.placeholder(f"given_{len(made)}")
            last.meta["val"] = node.meta["val"][position]
            for reader in [u for u in node.users if u.target is operator.getitem and u.args[1] == position]:
                reader.replace_all_uses_with(last)
            with graph.inserting_after(node):
                made.append(graph.call_function(operator.getitem, (node, position)))
            made[-1].meta["val"] = node.meta["val"][position]
    results: Any = graph.output_node().args[0]
    placeholders = set(graph.find_nodes(op="placeholder"))
    kept = [
        i
        for i, r in enumerate(results)
        if isinstance(r, fx.Node)
        and r not in placeholders
        and isinstance(r.meta["val"], Tensor)
        and not (i < len(record.keys) and record.keys[i][0] == "counts")
    ]
    graph.output_node().args = ([*(results[i] for i in kept), *made],)
    graph.eliminate_dead_code()
    return Cut(fx.GraphModule(record.half, graph), kept)


class HalfInOnnx:
    """A half in onnxruntime, translated as in an export."""

    def __init__(self, record: Recorded, path: Path) -> None:
        self.cut = cut(record)
        copy = fx.GraphModule(self.cut.module, _copied(self.cut.module.graph))
        arguments = [n.meta["val"] for n in copy.graph.find_nodes(op="placeholder")]
        self.inputs = [f"in_{i}" for i in range(len(arguments))]
        with quiet():
            model = ir.Model(ir.Graph([], [], nodes=[], name="half"), ir_version=10)
            translate(decompose(copy, arguments, lambda _: "the half"), model, model.graph, lambda _: "the half")
            for name, value in zip(self.inputs, model.graph.inputs, strict=True):
                value.name = name
                if value.type is None:  # a size
                    value.type, value.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([])
            results: Any = self.cut.module.graph.output_node().args[0]
            for i, (value, node) in enumerate(zip(model.graph.outputs, results, strict=True)):
                value.name = f"out_{i}"
                dtype = torch.empty(0, dtype=node.meta["val"].dtype).numpy().dtype
                value.type = ir.TensorType(ir.DataType.from_numpy(dtype))
                value.shape = ir.Shape([None] * node.meta["val"].dim())
            write_model(model, path)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def __call__(self, record: Recorded) -> list[Tensor]:
        given = [*record.arguments, *(v for pair in record.codes for v in pair)]
        feeds = {
            name: value.numpy() if isinstance(value, Tensor) else np.array(value, np.int64)
            for name, value in zip(self.inputs, given, strict=True)
        }
        return [torch.from_numpy(np.asarray(v)) for v in self.session.run(None, feeds)]


def _copied(graph: fx.Graph) -> fx.Graph:
    copy, known = fx.Graph(), dict[fx.Node, fx.Node]()
    copy.output(copy.graph_copy(graph, known))
    for old, new in known.items():
        new.meta = dict(old.meta)
    return copy


def _in_double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


class Exact(fx.Interpreter):
    """A cut half in double precision, on the same operands."""

    def __init__(self, found: Cut, record: Recorded) -> None:
        super().__init__(found.module, garbage_collect_values=False)
        given = [*record.arguments, *(v for pair in record.codes for v in pair)]
        self.results = self.run(*(_in_double(v) for v in given))

    def run_node(self, n: fx.Node) -> Any:
        """Constants of the graph are in single precision, and PyTorch's attention takes a mask's bits as they are."""
        return fx.node.map_aggregate(super().run_node(n), _in_double)

    def bounds(self, result: fx.Node) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor] | None:
        """Of a signed gradient: predicted, full, threshold; and how far float32 may be off each; None if not signed."""
        chosen = [n for n in ancestors([result]) if n.target is e2.select.default]
        if not chosen:
            return None
        node = max(chosen)
        predicted, full, tau = (self.env[a] for a in node.args)  # type: ignore[index]
        off_predicted, off_full = self._error(node.args[0]), self._error(node.args[1])  # type: ignore[arg-type]
        off_tau = off_predicted.max() * (tau / predicted.abs().max().clamp_min(1e-300)) + 4 * UNIT * tau
        return predicted, full, tau, off_predicted, off_full, off_tau

    def peak(self, node: fx.Node) -> float:
        """The largest element of a value; of a sum, the largest sum of magnitudes.

        The gradient of a bias in front of a norm is exactly zero, and in any arithmetic a sum of rounding errors.
        """
        inner = node
        while inner.target in LAYOUT_OPS:
            inner = inner.args[0]  # type: ignore[assignment]
        if inner.target is aten.sum.dim_IntList:
            return float(aten.sum.dim_IntList(self.env[inner.args[0]].abs(), *inner.args[1:]).max())  # type: ignore[index]
        value: Tensor = self.env[node]
        return float(value.double().abs().max()) if value.numel() else 0.0

    def _error(self, node: fx.Node) -> Tensor:
        """Bound of the rounding error of sums of products in any order (Higham 2002, "Accuracy and stability", 3.1)."""
        terms = self._replaced(node, torch.ones_like) + 8  # decoding of both factors, the product, sums of results
        return terms * UNIT / (1 - terms * UNIT) * self._replaced(node, torch.abs)

    def _replaced(self, node: fx.Node, by: Any) -> Tensor:
        """The gradient with every factor of its products replaced: by magnitudes, or by ones to count the terms."""
        if node.target in LAYOUT_OPS or node.target in _SUMS or node.target is operator.getitem:
            args = fx.node.map_arg(
                node.args,
                lambda n: self._replaced(n, by) if isinstance(n.meta.get("val"), Tensor | tuple) else self.env[n],
            )
            return node.target(*args, **node.kwargs)  # type: ignore[operator, no-any-return]
        args = fx.node.map_arg(node.args, lambda n: by(v) if isinstance(v := self.env[n], Tensor) else v)
        return node.target(*args, **node.kwargs)  # type: ignore[operator, no-any-return]


@dataclass
class Agreement:
    """What the halves of some steps showed, on identical operands.

    Attributes:
        signs: Elements of gradients with a predicted sign.
        equal: Of them, those with the same sign in onnxruntime and in PyTorch.
        inexact: Those whose sign in onnxruntime is not the exact one.
        beyond: Of those, how many lie outside the rounding bound of a tie.
        nearest_tie: The largest distance from a tie among ``inexact``, as a share of the bound.
        codes: Codes that quantizers found.
        flipped: Of them, those that onnxruntime rounded to another code.
        flipped_by_more: Of those, the ones that are not the next code.
        flip_distance: The largest distance of a flipped value from the middle between two codes, relative to the
            largest value that the scale has codes for.
        value_difference: The largest difference of any other value from the exact one, relative to ``Exact.peak``.
        worst: Where that is.
        apart: Of ``signs``, those that are other ones in a step that onnxruntime took with codes of its own.
        apart_from_tie: The largest distance of these from a tie, relative to the tensor's largest gradient.
    """

    signs: int = 0
    equal: int = 0
    inexact: int = 0
    beyond: int = 0
    nearest_tie: float = 0.0
    codes: int = 0
    flipped: int = 0
    flipped_by_more: int = 0
    flip_distance: float = 0.0
    value_difference: float = 0.0
    worst: str = ""
    apart: int = 0
    apart_from_tie: float = 0.0

    def add(
        self, name: str, record: Recorded, found: Cut, results: Sequence[Tensor], free: Mapping[str, Any] | None = None
    ) -> None:
        """Compare one half's results in onnxruntime with PyTorch's and with the exact ones.

        ``free`` are the gradients of a step that onnxruntime took with codes of its own, by parameter.
        """
        exact = Exact(found, record)
        nodes: Any = found.module.graph.output_node().args[0]
        n = len(found.outputs)
        for position, node, result, true in zip(found.outputs, nodes[:n], results[:n], exact.results[:n], strict=True):
            bounds = exact.bounds(node)
            if bounds is not None:
                self._signs(result, record.results[position], *bounds)
                kind, key = record.keys[position]
                if free is not None and kind == "grad" and key[1] in free:
                    self._apart(torch.from_numpy(free[key[1]]), record.results[position], *bounds[:3])
            else:
                self._value(f"{name} {node.name}", result, true, exact.peak(node))
        quantizers = [m for m in found.module.graph.nodes if is_quantizer(m)]
        for i, node in enumerate(quantizers):
            codes, scale = results[n + 2 * i], results[n + 2 * i + 1]
            true = exact.results[n + 2 * i + 1]
            self._value(f"{name} {node.name} scale", scale, true, float(true.max()))
            ratio = exact.env[node.args[0]] / exact.results[n + 2 * i + 1]
            self._codes(codes, record.codes[i][0], ratio, 2 ** (node.args[1] - 1) - 1)

    def _signs(
        self,
        result: Tensor,
        torchs: Tensor,
        predicted: Tensor,
        full: Tensor,
        tau: Tensor,
        off_predicted: Tensor,
        off_full: Tensor,
        off_tau: Tensor,
    ) -> None:
        sure = predicted.abs() >= tau
        true = torch.where(sure, predicted, full).sign()
        wrong = result.sign() != true
        zero = torch.where(sure, predicted.abs() / off_predicted, full.abs() / off_full)
        tie = torch.minimum(zero, (predicted.abs() - tau).abs() / (off_predicted + off_tau))
        self.signs += result.numel()
        self.equal += int((result.sign() == torchs.sign()).sum())
        self.inexact += int(wrong.sum())
        if wrong.any():
            self.beyond += int((tie[wrong] > 1).sum())
            self.nearest_tie = max(self.nearest_tie, float(tie[wrong].max()))

    def _apart(self, free: Tensor, torchs: Tensor, predicted: Tensor, full: Tensor, tau: Tensor) -> None:
        other = free.sign() != torchs.sign()
        if other.any():
            chosen = torch.where(predicted.abs() >= tau, predicted, full).abs()
            tie = torch.minimum(chosen, (predicted.abs() - tau).abs()) / full.abs().max()
            self.apart += int(other.sum())
            self.apart_from_tie = max(self.apart_from_tie, float(tie[other].max()))

    def _value(self, name: str, result: Tensor, true: Tensor, peak: float) -> None:
        if result.numel() == 0 or not result.is_floating_point():
            return
        off = float((result.double() - true).abs().max()) / max(peak, 1e-30)
        if off > self.value_difference:
            self.value_difference, self.worst = off, name

    def _codes(self, codes: Tensor, torchs: Tensor, ratio: Tensor, limit: int) -> None:
        apart = (codes.int() - torchs.int()).abs()
        other = apart > 0
        self.codes += codes.numel()
        self.flipped += int(other.sum())
        self.flipped_by_more += int((apart > 1).sum())
        if other.any():
            away = (ratio - ratio.floor() - 0.5).abs() / limit
            self.flip_distance = max(self.flip_distance, float(away[other].max()))


class Checker:
    """The halves of a transformed model in onnxruntime, each translated once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.halves: dict[str, HalfInOnnx] = {}
        self.found = Agreement()

    def add(self, records: Mapping[str, Recorded], free: Mapping[str, Any] | None = None) -> None:
        """Compare the halves of one step; ``free`` as for ``Agreement.add``."""
        for name, record in records.items():
            if name not in self.halves:
                self.halves[name] = HalfInOnnx(record, self.folder / f"{name.replace('/', '_')}.onnx")
            half = self.halves[name]
            self.found.add(name, record, half.cut, half(record), free)
