"""From joint graphs to the operations that a cost model prices."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from e2pass.cost import OpSite, Phase, Technique, TensorSpec
from e2pass.dump import target_name
from e2pass.lowering.joint import Joint
from e2pass.lowering.partition import forward_half
from e2pass.lowering.products import gradient_dependent, weight_gradients
from e2pass.step.node import GraphNode

aten = torch.ops.aten
_PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}


@dataclass(frozen=True)
class Place:
    """Where a joint graph stands in the training step.

    Attributes:
        region: Its name.
        paths: Module path of the user's model for each node of the forward graph it was traced from.
        blocks: Residual block of each such node.
        gate: Index of the gate that decides about it.
        technique: Of the nodes that no rewrite inserted.
        tag: Of the same.
        phase: Overrides the phase of forward nodes (the loss).
    """

    region: str
    paths: Mapping[str, str]
    blocks: Mapping[str, str]
    gate: int | None = None
    technique: Technique = Technique.BASE
    tag: str = ""
    phase: Phase | None = None


def joint_nodes(joint: Joint, place: Place, batch: int, half: int | None = None) -> list[GraphNode]:
    """Every operation of a joint graph at a batch size, and at another one beside it if ``half`` is given."""
    return _Converter(joint, place, batch, half).run()


class _Converter:
    def __init__(self, joint: Joint, place: Place, batch: int, half: int | None) -> None:
        self.joint, self.place, self.batch, self.half = joint, place, batch, half
        self.sizes: dict[tuple[Any, int], int] = {}
        self.specs: dict[tuple[int, int | None, bool, int], TensorSpec] = {}  # a tensor is looked at by all its users
        self.backward = gradient_dependent(joint)
        self.forward = forward_half(joint)
        self.saved = saved_activations(joint, self.forward)
        self.dw: dict[fx.Node, str] = {}
        for gradient in weight_gradients(joint):
            for node in gradient.products:
                self.dw[_product(node)] = gradient.target
            if gradient.value.meta.get("e2_technique") == Technique.PSG:
                self._claim(gradient.value, gradient.target)
        for (kind, key), value in zip(joint.outputs, joint.output_nodes(), strict=True):
            if kind == "predicted":
                self._claim(value, key)

    def _claim(self, value: fx.Node, weight: str) -> None:
        """A rewritten gradient: the products behind select are its weight's, full and predicted."""
        stack, seen = [value], set()
        while stack:
            node = stack.pop()
            if node in seen or node not in self.backward:
                continue
            seen.add(node)
            if node.target in _PRODUCTS or node.target is aten.convolution_backward.default:
                self.dw.setdefault(node, weight)
                continue
            stack.extend(node.all_input_nodes)

    def run(self) -> list[GraphNode]:
        return [self._node(n) for n in self.joint.graph.nodes if n.op == "call_function"]

    def _node(self, node: fx.Node) -> GraphNode:
        source = node.meta.get("e2_from", "")
        place = self.place
        technique = Technique(node.meta["e2_technique"]) if node.meta.get("e2_technique") else place.technique
        site = OpSite(
            name=f"{place.region}/{node.name}",
            op=target_name(node),
            args=self._args(node, self.batch),
            kwargs={k: self._value(v, self.batch) for k, v in node.kwargs.items() if isinstance(v, int | float | bool)},
            outputs=tuple(self._outputs(node, self.batch)),
            region=place.region,
            layer=place.paths.get(source, ""),
            block=place.blocks.get(source),
            phase=self._phase(node),
            technique=technique,
        )
        return GraphNode(
            site=site,
            tag=node.meta.get("e2_tag") or place.tag,
            gate=place.gate,
            full_dw=self.dw.get(node, "") if node.meta.get("e2_full_dw") else "",
            operands=tuple(f"{place.region}/{n.name}" for n in node.all_input_nodes if n.op == "call_function"),
            fx_node=node,
            half=None if self.half is None else self._at(site, node, self.half),
        )

    def _at(self, site: OpSite, node: fx.Node, batch: int) -> OpSite:
        """The same operation at another batch size."""
        return replace(site, args=self._args(node, batch), outputs=tuple(self._outputs(node, batch)))

    def _args(self, node: fx.Node, batch: int) -> tuple[Any, ...]:
        in_backward = node not in self.forward
        return tuple(self._value(a, batch, in_backward) for a in node.args)

    def _phase(self, node: fx.Node) -> Phase:
        if node.meta.get("e2_phase") is not None:
            return Phase(node.meta["e2_phase"])
        if node in self.forward:
            return self.place.phase or Phase.FORWARD
        if self.place.phase is not None:
            return self.place.phase
        if node in self.dw:
            return Phase.DW
        if node in self.backward and node.target in _PRODUCTS:
            return Phase.DX
        if node.target is aten.convolution_backward.default:
            mask = node.args[-1]
            return Phase.DX if mask[0] else Phase.DW if mask[1] else Phase.BACKWARD  # type: ignore[index]
        return Phase.BACKWARD

    def _outputs(self, node: fx.Node, batch: int) -> Iterator[TensorSpec]:
        value = node.meta.get("val")
        if not isinstance(value, tuple | list):
            if isinstance(value, Tensor):
                yield self._spec(value, batch, node.meta.get("e2_bits"), self._kept(node))
            return
        results = {u.args[1]: u for u in node.users if len(u.args) == 2}
        for i, leaf in enumerate(value):
            if isinstance(leaf, Tensor):
                width = results[i].meta.get("e2_bits") if i in results else None
                yield self._spec(leaf, batch, width, i in results and self._kept(results[i]))

    def _kept(self, node: fx.Node) -> bool:
        return node in self.forward and node in self.saved

    def _value(self, value: Any, batch: int, in_backward: bool = False) -> Any:
        if isinstance(value, fx.Node):
            held = value.meta.get("val")
            if isinstance(held, Tensor):
                return self._spec(held, batch, value.meta.get("e2_bits"), in_backward and value in self.saved)
            return self._size(held, batch) if isinstance(held, torch.SymInt) else None
        if isinstance(value, list | tuple):
            return tuple(self._value(v, batch, in_backward) for v in value)
        return value if isinstance(value, int | float | bool) or value is None else str(value)

    def _spec(self, tensor: Tensor, batch: int, bits: int | None, saved: bool = False) -> TensorSpec:
        key = (id(tensor), bits, saved, batch)
        if key not in self.specs:
            shape = tuple(self._size(s, batch) for s in tensor.shape)
            self.specs[key] = TensorSpec(shape, bits if bits is not None else tensor.dtype.itemsize * 8, saved)
        return self.specs[key]

    def _size(self, size: Any, batch: int) -> int:
        if isinstance(size, int):
            return size
        if self.joint.batch == batch:
            return int(size.node.hint)
        expression = size.node.expr
        if (expression, batch) not in self.sizes:
            self.sizes[expression, batch] = int(expression.subs(self.joint.symbol, batch))
        return self.sizes[expression, batch]


def _product(node: fx.Node) -> fx.Node:
    return node.args[0] if getattr(node.target, "__name__", "") == "getitem" else node  # type: ignore[return-value]


def saved_activations(joint: Joint, forward: set[fx.Node]) -> set[fx.Node]:
    """Activations that the forward half leaves to the backward half, and what the backward half sees of them.

    An activation depends on an input of the region: codes of weights, which are saved as well, are none. Views and
    decoded codes are the same bytes, so those that the backward half takes of a saved activation belong to it, and
    what the forward half took a view of does.
    """
    placeholders = joint.graph.find_nodes(op="placeholder")
    active = {n for n, (kind, _) in zip(placeholders, joint.inputs, strict=True) if kind == "input"}
    for node in joint.graph.nodes:
        if node in forward and active.intersection(node.all_input_nodes):
            active.add(node)
    saved: set[fx.Node] = set()
    for node in joint.graph.nodes:
        if node.op == "call_function" and node not in forward:
            left = {n for n in node.all_input_nodes if n in active}
            saved |= left
            if _same_bytes(node) and (left or saved.intersection(node.all_input_nodes)):
                saved.add(node)
    for node in reversed(joint.graph.nodes):
        if node in saved and node in forward and _same_bytes(node):
            saved.update(n for n in node.all_input_nodes if n in active)
    return saved


def _same_bytes(node: fx.Node) -> bool:
    """Whether a node moves nothing: a view, one of several results, or the decoding of codes, which the array reads."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return node.target is operator.getitem
    return schema.name == "e2pass::dequantize" or any(r.alias_info for r in schema.returns)
