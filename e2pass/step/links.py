"""Ties the operations of a training step together: who reads what across regions, in which order, and where from.

The nodes of each joint graph know their operands within it. What enters a region (values, tangents, gate states) is
known by the plan, so the links between regions are found by walking it forwards for values and backwards for gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from e2pass.cost import Phase
from e2pass.lowering.joint import Joint
from e2pass.parameters import parameter_names, region_parameters
from e2pass.plan import Decide, Region, RunRegion, Skip
from e2pass.program import Program
from e2pass.step.batch import DATA, TARGET_NODE, batch_nodes
from e2pass.step.node import GraphNode

Contribution = tuple[list[str], int | None]
"""Who makes a part of a gradient, and the gate that decides whether it is made."""

LOSS = "loss"


def merge_name(value: str) -> str:
    """Name of the operation that joins a body to its shortcut and so produces ``value``."""
    return f"merge/{value}"


def merge_names(step: Skip) -> list[str]:
    """Names of the operations that add each output of a body; the last one produces the block's value."""
    name = merge_name(step.out)
    return [*(f"{name}.{i}" for i in range(len(step.body.outputs) - 1)), name]


def worth_name(step: Skip) -> str:
    """Name of the operation that ends in the gradient of a gate's decision."""
    return f"{merge_name(step.out)}_{'sum' if len(step.body.outputs) == 1 else 'total'}"


def gradient_sum_name(value: str, index: int) -> str:
    """Name of the ``index``-th addition of the gradients that ``value`` receives."""
    return f"gradient_sum/{value}_{index}"


def weight_sum_name(weight: str, what: str) -> str:
    """Name of an operation on the gradients that several regions have for one weight."""
    return f"weight_sum/{weight}_{what}"


def opaque_backward_name(region: str) -> str:
    """Name of the operation that stands for the backward half of a region without a joint graph."""
    return f"{region}/backward"


def gate_region(index: int) -> str:
    """Name of the region of gate ``index``."""
    return f"gate_{index}"


def link(
    program: Program, nodes: Iterable[GraphNode], joints: Mapping[str, Joint], techniques: Collection[str]
) -> list[GraphNode]:
    """Complete ``nodes`` to one graph.

    Args:
        program: Holds the plan that the nodes come from.
        nodes: The operations, in any order.
        joints: Joint graph of each region among them: lowered regions, gates and the loss.
        techniques: Those that act in this step; the original one has none, so neither gates nor SMD.

    Returns:
        The nodes with all operands, with origin and types, with nodes for the batch in front, each behind those it
        reads.
    """
    return _Linker(program, list(nodes), joints, techniques).run()


class _Linker:
    def __init__(
        self, program: Program, nodes: list[GraphNode], joints: Mapping[str, Joint], techniques: Collection[str]
    ) -> None:
        self.program, self.joints, self.gated = program, joints, "slu" in techniques
        self.plan = program.plans["train"]
        self.flat = {n.name: n for n in program.graphs["train"].graph.nodes}
        self.nodes = {node.name: node for node in [*batch_nodes(program, joints, techniques), *nodes]}
        self.reads: dict[str, list[str]] = {name: list(node.operands) for name, node in self.nodes.items()}
        self.state: dict[str, list[str]] = {}
        self.values: dict[str, list[str]] = {}
        self.gates: dict[str, list[list[str]]] = {}
        self.gradients: dict[str, list[Contribution]] = {}
        self.weights: dict[str, dict[str, list[Contribution]]] = {}
        self.stages: dict[str, int] = {}
        self.owner = parameter_names(program.model)
        self.summed: set[str] = set()
        self.gate_index = {gate_region(s.index): s.index for s in self.plan.steps if isinstance(s, Decide)}
        self.merge_of = {s.gate: s for s in self.plan.steps if isinstance(s, Skip)}
        self.next_gate = {s.previous: s.index for s in self.plan.steps if isinstance(s, Decide) and s.previous}

    def run(self) -> list[GraphNode]:
        for name in self.plan.inputs:
            self.values[name] = [f"{DATA}/{name}"]
        for stage, step in enumerate(self.plan.steps):
            self._forward(step, stage)
        self._loss()
        for stage, step in reversed(list(enumerate(self.plan.steps))):
            self._backward(step, stage)
        for weight, gradients in self.weights.items():
            self._update(weight, gradients)
        linked = [
            replace(
                node,
                operands=tuple(self.reads[name]),
                state=tuple(dict.fromkeys(self.state.get(name, node.state))),
                stage=self._stage_of(node),
            )
            for name, node in self.nodes.items()
        ]
        return sorted(linked, key=_position)  # stable: within a half of a stage the order stays

    # Forward

    def _forward(self, step: RunRegion | Decide | Skip, stage: int) -> None:
        if isinstance(step, RunRegion):
            self._stage([step.region.name], stage)
            self._enter(step.region)
            for i, name in enumerate(step.region.outputs):
                self.values[name] = self._output(step.region, i)
        elif isinstance(step, Decide):
            self._stage([gate_region(step.index)], stage)
            self._decide(step)
        else:
            names = merge_names(step)
            self._stage([step.body.name, merge_name(step.out)], stage)
            self._enter(step.body)
            decision = self.gates.get(step.gate, [[]])[0] if self.gated else []
            value, worth = self._value(step.shortcut), ""
            for i, name in enumerate(names):
                arm = self._output(step.body, i)
                self._read(name, [*value, *arm, *decision])
                value = [name]
                if f"{name}_worth" in self.nodes:
                    self._read(f"{name}_worth", arm)
                    self._read(f"{name}_sum", [f"{name}_worth"])
                    if worth:
                        self._read(f"{name}_total", [worth, f"{name}_sum"])
                    worth = f"{name}_total" if worth else f"{name}_sum"
            self.values[step.out] = value

    def _stage(self, regions: list[str], stage: int) -> None:
        for name in regions:
            self.stages[name] = stage

    def _enter(self, region: Region) -> None:
        """Link what a region reads to who made it; a region without a joint graph is linked node by node."""
        if region.name in self.joints:
            self._placeholders(region.name, {i: self._value(name) for i, name in enumerate(region.inputs)})
            return
        for node in region.graph.nodes:
            name = f"{region.name}/{node.name}"
            if name in self.nodes:
                for operand in node.all_input_nodes:
                    inner = f"{region.name}/{operand.name}"
                    self._read(name, [inner] if inner in self.nodes else self._value(operand.name))

    def _decide(self, step: Decide) -> None:
        region = gate_region(step.index)
        if not self.gated or region not in self.joints:
            return
        before = self.gates.get(step.previous or "", [[], [], []])
        self._placeholders(region, {0: self._value(step.fork), 1: before[1], 2: before[2]})
        self.gates[step.out] = [self._joint_output(region, ("output", i)) for i in range(3)]

    def _placeholders(self, region: str, values: Mapping[int, list[str]]) -> None:
        """Give the readers of each placeholder the nodes that stand behind it, and note parameters and buffers."""
        joint = self.joints[region]
        for placeholder, (kind, key) in zip(joint.graph.find_nodes(op="placeholder"), joint.inputs, strict=True):
            for user in placeholder.users:
                name = f"{region}/{user.name}"
                if kind == "input":
                    self._read(name, values.get(key, []))
                elif kind in ("param", "buffer"):
                    self.state.setdefault(name, []).append(self._state_name(region, str(key)))

    def _state_name(self, region: str, key: str) -> str:
        """Name in ``t.model``; gates are traced apart, as a module with a gate, the shared LSTM and its head."""
        index = self.gate_index.get(region)
        if index is None:
            return key
        return f"e2_slu.gates.{index}.{key.removeprefix('gate.')}" if key.startswith("gate.") else f"e2_slu.{key}"

    def _value(self, name: str) -> list[str]:
        return self.values.get(name, [])

    def _output(self, region: Region, index: int) -> list[str]:
        if region.name in self.joints:
            return self._joint_output(region.name, ("output", index), region)
        name = f"{region.name}/{region.outputs[index]}"
        return [name] if name in self.nodes else []

    def _joint_output(self, name: str, key: tuple[str, object], region: Region | None = None) -> list[str]:
        joint = self.joints[name]
        for described, value in zip(joint.outputs, joint.output_nodes(), strict=True):
            if described == key and isinstance(value, fx.Node):
                return self._behind(name, value, region)
        return []

    def _behind(self, region_name: str, value: fx.Node, region: Region | None) -> list[str]:
        """The node that makes ``value``; for one that is only passed through, who made it before."""
        if value.op != "placeholder":
            return [f"{region_name}/{value.name}"]
        joint = self.joints[region_name]
        kind, key = joint.inputs[joint.graph.find_nodes(op="placeholder").index(value)]
        if kind == "input" and region is not None:
            return self._value(region.inputs[key])
        if kind == "tangent" and region is not None:
            return self._gradient(region.outputs[key])
        return []

    # Loss and backward

    def _loss(self) -> None:
        if LOSS not in self.joints:
            return
        output = next((v for v in self._model_outputs() if v in self.values), None)
        if output is None:
            return
        self._placeholders(LOSS, {0: self._value(output), 1: [TARGET_NODE]})
        self._contribute(output, self._joint_output(LOSS, ("grad", ("input", 0))), None)

    def _model_outputs(self) -> Iterator[str]:
        for leaf in tree_leaves(self.plan.output):
            name = getattr(leaf, "name", "")
            value = self.flat[name].meta["val"] if name in self.flat else None
            if isinstance(value, Tensor) and value.is_floating_point():
                yield name

    def _backward(self, step: RunRegion | Decide | Skip, stage: int) -> None:
        if isinstance(step, RunRegion):
            self._stage_sums(step.region.outputs, stage)
            self._leave(step.region, None)
        elif isinstance(step, Skip):
            self._stage_sums((step.out,), stage)
            arrived = self._gradient(step.out)
            self._contribute(step.shortcut, arrived, None)
            for name in step.body.outputs:
                self._contribute(name, arrived, step.index)
            for name in merge_names(step):
                self._read(f"{name}_worth", arrived)
            self._leave(step.body, step.index)
        else:
            self._leave_gate(step)

    def _stage_sums(self, values: Iterable[str], stage: int) -> None:
        for value in values:
            self.stages[f"gradient_sum/{value}"] = stage

    def _leave(self, region: Region, gate: int | None) -> None:
        """Link the tangents of a region, and pass on the gradients that it produces."""
        if region.name not in self.joints:
            self._leave_opaque(region, gate)
            return
        self._tangents(region.name, [self._gradient(name) for name in region.outputs])
        joint = self.joints[region.name]
        for (kind, key), value in zip(joint.outputs, joint.output_nodes(), strict=True):
            if not isinstance(value, fx.Node):
                continue
            if kind == "grad" and key[0] == "input":
                self._contribute(region.inputs[key[1]], self._behind(region.name, value, region), gate)
            elif kind == "predicted" or (kind == "grad" and key[0] == "param"):
                weight = self.owner[key if kind == "predicted" else key[1]]
                kinds = self.weights.setdefault(weight, {"full": [], "predicted": []})
                which = kinds["predicted" if kind == "predicted" else "full"]
                which.append((self._behind(region.name, value, region), gate))

    def _leave_opaque(self, region: Region, gate: int | None) -> None:
        """All gradients that leave a region without a joint graph come from the one node of its backward half."""
        backward = opaque_backward_name(region.name)
        if backward not in self.nodes:
            return
        self._read(backward, [node for i in range(len(region.outputs)) for node in self._output(region, i)])
        self._read(backward, [node for name in region.outputs for node in self._gradient(name)])
        for name, spec in zip(region.inputs, region.specs, strict=True):
            if spec.requires_grad:
                self._contribute(name, [backward], gate)
        for weight in dict.fromkeys(self.owner[p] for p in region_parameters(region, self.program.model)):
            self.weights.setdefault(weight, {"full": [], "predicted": []})["full"].append(([backward], gate))

    def _leave_gate(self, step: Decide) -> None:
        region = gate_region(step.index)
        if not self.gated or region not in self.joints:
            return
        worth = worth_name(self.merge_of[step.out]) if step.out in self.merge_of else ""
        following = gate_region(self.next_gate[step.out]) if step.out in self.next_gate else ""
        states: list[list[str]] = [[], []]
        if following in self.joints:
            states = [self._joint_output(following, ("grad", ("input", i))) for i in (1, 2)]
        self._tangents(region, [[worth] if worth in self.nodes else [], *states])
        joint = self.joints[region]
        for (kind, key), value in zip(joint.outputs, joint.output_nodes(), strict=True):
            if kind == "grad" and key[0] == "param" and isinstance(value, fx.Node):
                weight = self._state_name(region, key[1]).removeprefix("e2_slu.")
                self._read(f"update/gates.{weight}", [f"{region}/{value.name}"])

    def _tangents(self, region: str, gradients: list[list[str]]) -> None:
        joint = self.joints[region]
        for placeholder, (kind, key) in zip(joint.graph.find_nodes(op="placeholder"), joint.inputs, strict=True):
            if kind == "tangent":
                for user in placeholder.users:
                    self._read(f"{region}/{user.name}", gradients[key])

    def _contribute(self, value: str, source: list[str], gate: int | None) -> None:
        if source:
            self.gradients.setdefault(value, []).append((source, gate))

    def _gradient(self, value: str) -> list[str]:
        """Who holds the whole gradient of ``value``: its only contributor, or the last of the additions."""
        return self._total(self.gradients.get(value, []), lambda i: gradient_sum_name(value, i))

    def _update(self, weight: str, kinds: dict[str, list[Contribution]]) -> None:
        """Sum what several regions have for a weight, sign it where PSG waits for the sum, and update it."""

        def named(what: str) -> str:
            return weight_sum_name(weight, what)

        full = self._total(kinds["full"], lambda i: named(f"full_{i}"))
        predicted = self._total(kinds["predicted"], lambda i: named(f"predicted_{i}"))
        reads = {
            "threshold": predicted,
            "select": [*predicted, *full, named("threshold")],
            "sign": [named("select")],
            "scale_abs": predicted,
            "scale_mean": [named("scale_abs")],
            "scale": [named("sign"), named("scale_mean")],
        }
        for what, operands in reads.items():
            self._read(named(what), operands)
        last = next((n for n in (named("scale"), named("sign")) if n in self.nodes), None)
        gradients = full if last is None else [last]
        self._read(f"update/{weight}", gradients)
        self.stages[f"update/{weight}"] = max((self._stage_of(self.nodes[g]) for g in gradients), default=-1)

    def _total(self, found: list[Contribution], named: Callable[[int], str]) -> list[str]:
        """Read contributions into the additions called ``named(i)``; those that are always there come first."""
        ordered = [s for s, g in reversed(found) if g is None] + [s for s, g in reversed(found) if g is not None]
        if not ordered:
            return []
        total = ordered[0]
        for i, source in enumerate(ordered[1:]):
            name = named(i)
            if name not in self.nodes:
                total = [*total, *source]
                continue
            if name not in self.summed:
                self.summed.add(name)
                self._read(name, [*total, *source])
            total = [name]
        return total

    def _read(self, name: str, operands: Iterable[str]) -> None:
        if name in self.reads:
            held = self.reads[name]
            held.extend(o for o in operands if o in self.nodes and o not in held)

    def _stage_of(self, node: GraphNode) -> int:
        if node.site.phase is Phase.UPDATE:
            return self.stages.get(node.name, -1)
        region, value = node.site.region, value_of(node)
        return self.stages.get(f"{region}/{value}" if value else region, -1)


def value_of(node: GraphNode) -> str:
    """The value of the flat graph that a merge or the sum of gradients is about, ``""`` for other nodes."""
    inner = node.inner_name
    if node.site.region == "merge":
        value = inner.partition(".")[0]
        return value.removesuffix("_worth").removesuffix("_sum").removesuffix("_total")
    return inner.rpartition("_")[0] if node.site.region == "gradient_sum" else ""


def _position(node: GraphNode) -> tuple[int, int, int]:
    """Sorting key: the batch, forward by stage, the loss, backward from the last stage to the first, the update."""
    phase, region = node.site.phase, node.site.region
    if phase is Phase.DATA:
        return (0, 0, 0)
    if phase is Phase.FORWARD:
        return (1, node.stage, 0)
    if region == LOSS:
        return (2, 0, 0)
    if phase is Phase.UPDATE:
        return (4, 0, 0)
    # A gradient is summed before the region that made the value goes back; a merge asks for it before its body does.
    within = 0 if region == "gradient_sum" else 1 if region == "merge" else 2
    return (3, -node.stage, within)
