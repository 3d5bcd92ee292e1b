"""The operations of the training step outside of the regions' graphs: gates, merges, sums of gradients, the update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from e2pass.cost import OpSite, Phase, Technique, TensorSpec
from e2pass.lowering.joint import BATCH, Joint
from e2pass.parameters import parameter_names, region_parameters
from e2pass.plan import Decide, Region, RunRegion, Skip
from e2pass.program import Program
from e2pass.runtime.gates import Gate, SLUGates
from e2pass.step.links import gate_region, gradient_sum_name, merge_names, opaque_backward_name, weight_sum_name
from e2pass.step.node import GraphNode
from e2pass.step.side_graphs import lower_gate
from e2pass.step.sites import Place, joint_nodes


class Outside:
    """Makes the nodes of one program's training step.

    Attributes:
        batch: Batch size of the example inputs.
        weights: Trainable parameters by the name under which each is registered first.
        paths: Module path of each value of the plan.
        readers: For each of the weights the regions that use it, each as the gate that decides about it.
        gate_joints: Joint graph of each gate, once ``gates`` has run.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.batch = program.inputs.batch_size
        self.plan = program.plans["train"]
        self.regions = {r.name: r for r in self.plan.regions}
        self.values = {n.name: n for n in program.graphs["train"].graph.nodes}
        self.weights = {n: p for n, p in program.model.named_parameters() if p.requires_grad}
        self.paths = {name: path for region in self.plan.regions for name, path in region.paths.items()}
        self.readers = self._readers()
        self.gate_joints: dict[str, Joint] = {}
        self.wants_grad = {
            name: spec.requires_grad for r in self.plan.regions for name, spec in zip(r.inputs, r.specs, strict=True)
        }

    def region_nodes(self) -> tuple[list[GraphNode], list[GraphNode]]:
        """Operations of all lowered regions, before and after the rewrites; half a batch beside the gated ones."""
        before: list[GraphNode] = []
        after: list[GraphNode] = []
        for name, joints in self.program.lowered.items():
            region = self.regions[name]
            place = Place(name, region.paths, region.blocks, region.block)
            for found, joint in zip((before, after), joints, strict=True):
                split = not joint.fixed and self._splits(region.block)
                nodes = joint_nodes(joint, place, self.batch, self.batch // 2 if split else None)
                found += nodes
        return before, after

    def gates(self) -> list[GraphNode]:
        """The gate network of every block; open gates are shown and priced like learned ones, as what neutral adds."""
        slu = self._learned_gates()
        if slu is None:
            return []
        nodes: list[GraphNode] = []
        known: dict[Any, Any] = {}
        for step in self.plan.steps:
            if isinstance(step, Decide):
                gate: Gate = slu.gates[step.index]  # type: ignore[assignment]
                fork = self.values[step.fork].meta["val"]
                shape = (BATCH, *(self._size(s) for s in fork.shape[1:]))
                key = (shape, gate.channel_dim, step.previous is None)
                if key not in known:
                    known[key] = lower_gate(slu, gate, shape, step.previous is None, self.batch)
                block = str(self.values[step.out].meta["e2_block"])
                everywhere = _Always(block)
                self.gate_joints[gate_region(step.index)] = known[key]
                place = Place(gate_region(step.index), everywhere, everywhere, None, Technique.SLU, "slu.gate")
                nodes += joint_nodes(known[key], place, self.batch)
        return nodes

    def merges(self) -> list[GraphNode]:
        """The additions that join bodies to shortcuts; gates that learn ask how much the body was worth, too."""
        learns = self._learned_gates() is not None
        nodes: list[GraphNode] = []
        for step in self.plan.steps:
            if isinstance(step, Skip):
                nodes += self._on_samples(partial(self._merge, step, learns), step.index, "slu.merge")
        return nodes

    def _merge(self, step: Skip, learns: bool, batch: int) -> Iterator[OpSite]:
        block = str(self.values[step.out].meta["e2_block"])
        out, rows = self._spec(step.out, batch), TensorSpec((batch,))
        place: dict[str, Any] = {"layer": block, "block": block}
        for i, name in enumerate(merge_names(step)):
            yield OpSite(name, "aten.add.Tensor", (out, out), (out,), region="merge", **place)
            if learns:
                yield _backward(f"{name}_worth", "aten.mul.Tensor", (out, out), out, Technique.SLU, **place)
                yield _backward(f"{name}_sum", "aten.sum.dim_IntList", (out, (1,)), rows, Technique.SLU, **place)
            if learns and i > 0:
                yield _backward(f"{name}_total", "aten.add.Tensor", (rows, rows), rows, Technique.SLU, **place)

    def gradient_sums(self) -> list[GraphNode]:
        """A value that several regions read receives a gradient from each: autograd adds them."""
        nodes: list[GraphNode] = []
        for name, gates in self._reads().items():
            if self.wants_grad.get(name, False):
                for i, gate in enumerate(_further(gates)):
                    nodes += self._on_samples(partial(self._gradient_sum, name, i), gate)
        return nodes

    def _gradient_sum(self, value: str, i: int, batch: int) -> Iterator[OpSite]:
        spec = self._spec(value, batch)
        layer = self.paths.get(value, "")
        yield _backward(gradient_sum_name(value, i), "aten.add.Tensor", (spec, spec), spec, layer=layer)

    def weight_sums(self) -> list[GraphNode]:
        """Sums of the gradients that several regions have for one weight; predicted ones are signed after their sum."""
        nodes: list[GraphNode] = []
        for name, gates in self.readers.items():
            spec, layer = TensorSpec(tuple(self.weights[name].shape)), name.rpartition(".")[0]
            signed = name in self.program.shared
            kinds = {"full": Technique.BASE} | ({"predicted": Technique.PSG} if signed else {})
            for i, gate in enumerate(_further(gates)):
                for kind, technique in kinds.items():
                    what = weight_sum_name(name, f"{kind}_{i}")
                    site = _backward(what, "aten.add.Tensor", (spec, spec), spec, technique, layer=layer)
                    nodes.append(self._once(site, gate, "psg.predict" if kind == "predicted" else ""))
            if signed:
                nodes += self._signs(name, spec, layer)
        return nodes

    def _signs(self, name: str, spec: TensorSpec, layer: str) -> Iterator[GraphNode]:
        """What ``runtime.shared.SumThenSign`` does, once for all uses of a weight."""
        scalar, psg = TensorSpec(()), self.program.config.psg
        steps: list[tuple[str, str, tuple[Any, ...], TensorSpec]] = [
            ("threshold", "e2pass.threshold.default", (spec, 0.0 if psg is None else psg.beta), scalar),
            ("select", "e2pass.select.default", (spec, spec, scalar), spec),
            ("sign", "aten.sign.default", (spec,), spec),
        ]
        if psg is not None and psg.scale == "mean":
            steps += [
                ("scale_abs", "aten.abs.default", (spec,), spec),
                ("scale_mean", "aten.mean.default", (spec,), scalar),
                ("scale", "aten.mul.Tensor", (spec, scalar), spec),
            ]
        for kind, op, args, out in steps:
            site = _backward(weight_sum_name(name, kind), op, args, out, Technique.PSG, layer=layer)
            yield GraphNode(site, f"psg.{kind.partition('_')[0]}")

    def update(self, optimizer: str, states: int) -> list[GraphNode]:
        """The update of every trainable parameter; of one in a gated block only where some sample entered it."""
        nodes = []
        for name, parameter in self.weights.items():
            gates = set(self.readers.get(name, [None]))
            site = _update(name, parameter, optimizer, states, Technique.BASE)
            # Used in several blocks it counts as always updated.
            nodes.append(self._once(site, gates.pop() if len(gates) == 1 else None, "update"))
        slu = self._learned_gates()
        for name, parameter in () if slu is None else slu.named_parameters():
            site = replace(_update(f"gates.{name}", parameter, optimizer, states, Technique.SLU), layer="gates")
            nodes.append(GraphNode(site, "update"))
        smd = self.program.config.smd
        coasts = smd is not None and smd.coast
        return [replace(n, coasts=coasts) for n in nodes]

    def unlowered(self) -> list[GraphNode]:
        """Regions without a joint graph: listed without a price, never as nothing; backward is one operation."""
        nodes: list[GraphNode] = []
        for name, region in self.regions.items():
            if name in self.program.lowered:
                continue
            for node in region.graph.nodes:
                if node.op not in ("call_module", "call_function", "call_method"):
                    continue
                value = node.meta.get("val")
                specs = tuple(
                    TensorSpec(tuple(self._size(s) for s in v.shape), v.dtype.itemsize * 8)
                    for v in tree_leaves(value)
                    if isinstance(v, Tensor)
                )
                site = OpSite(f"{name}/{node.name}", f"opaque.{node.target}", specs, specs, region=name)
                nodes.append(GraphNode(site, "", region.block))
            nodes += self._opaque_backward(region)
        return nodes

    def _opaque_backward(self, region: Region) -> Iterator[GraphNode]:
        canonical = parameter_names(self.program.model)
        weights = [
            n
            for n in dict.fromkeys(canonical[p] for p in region_parameters(region, self.program.model))
            if n in self.weights
        ]
        wanted = [n for n, spec in zip(region.inputs, region.specs, strict=True) if spec.requires_grad]
        if not weights and not wanted:
            return
        made = [self._spec(n, self.batch) for n in wanted] + [TensorSpec(tuple(self.weights[n].shape)) for n in weights]
        given = tuple(self._spec(n, self.batch) for n in region.outputs)
        site = OpSite(
            opaque_backward_name(region.name), "opaque.backward", given, tuple(made),
            region=region.name, phase=Phase.BACKWARD,
        )  # fmt: skip
        yield GraphNode(site, "", region.block)

    def _learned_gates(self) -> SLUGates | None:
        slu: SLUGates | None = self.program.slu
        return slu if slu is not None and slu.kind in ("learned", "open") else None

    def _reads(self) -> dict[str, list[int | None]]:
        """For each value its readers, each as the gate that decides about it."""
        readers: dict[str, list[int | None]] = {}
        for step in self.plan.steps:
            if isinstance(step, RunRegion):
                for name in step.region.inputs:
                    readers.setdefault(name, []).append(None)
            elif isinstance(step, Skip):
                readers.setdefault(step.shortcut, []).append(None)
                for name in step.body.inputs:
                    readers.setdefault(name, []).append(step.index)
        return readers

    def _readers(self) -> dict[str, list[int | None]]:
        canonical = parameter_names(self.program.model)
        readers: dict[str, list[int | None]] = {}
        for region in self.plan.regions:
            for name in dict.fromkeys(canonical[p] for p in region_parameters(region, self.program.model)):
                if name in self.weights:
                    readers.setdefault(name, []).append(region.block)
        return readers

    def _on_samples(
        self, sites: Callable[[int], Iterator[OpSite]], gate: int | None, tag: str = ""
    ) -> Iterator[GraphNode]:
        """The operations of ``sites(batch)`` on the samples that ``gate`` lets in."""
        halves = [*sites(self.batch // 2)] if self._splits(gate) else None
        for i, site in enumerate(sites(self.batch)):
            yield GraphNode(site, tag, gate, half=None if halves is None else halves[i])

    def _once(self, site: OpSite, gate: int | None, tag: str) -> GraphNode:
        """An operation that happens once for a batch, if ``gate`` lets any sample in: half a batch costs the same."""
        return GraphNode(site, tag, gate, half=site if self._splits(gate) else None)

    def _splits(self, gate: int | None) -> bool:
        """Whether half a batch can be looked at: shapes that hold one batch size tell nothing about another."""
        return gate is not None and self.batch > 1 and self.program.capture.symbolic_batch

    def _spec(self, name: str, batch: int) -> TensorSpec:
        value = self.values[name].meta["val"]
        return TensorSpec(tuple(self._size(s, batch) for s in value.shape), value.dtype.itemsize * 8)

    def _size(self, size: Any, batch: int | None = None) -> int:
        if isinstance(size, int):
            return size
        expression = size.node.expr
        return int(expression.subs(dict.fromkeys(expression.free_symbols, batch or self.batch)))


def _further(gates: list[int | None]) -> list[int | None]:
    """All gradients but the first, which needs no addition: one that is always there, if any is."""
    return sorted(gates, key=lambda gate: gate is not None)[1:]


def _backward(
    name: str, op: str, args: tuple[Any, ...], out: TensorSpec, technique: Technique = Technique.BASE, **place: Any
) -> OpSite:
    region = name.partition("/")[0]
    return OpSite(name, op, args, (out,), region=region, phase=Phase.BACKWARD, technique=technique, **place)


def _update(name: str, parameter: Tensor, optimizer: str, states: int, technique: Technique) -> OpSite:
    spec = TensorSpec(tuple(parameter.shape))
    return OpSite(
        f"update/{name}", f"optimizer.{optimizer}", (spec,) * (2 + states), (spec,),
        region="update", layer=name.rpartition(".")[0], phase=Phase.UPDATE, technique=technique,
    )  # fmt: skip


class _Always(dict[str, str]):
    """A mapping that gives every key the same value."""

    def __init__(self, value: str) -> None:
        super().__init__()
        self.value = value

    def get(self, key: str, default: Any = None) -> Any:
        return self.value
