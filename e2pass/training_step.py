"""The training step beyond the regions: gates, merges, gradient sums, loss and update; and its price at given rates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from e2pass.cost import CostModel, OpSite, Phase, Technique, TensorSpec
from e2pass.diagnostics import Diagnostics
from e2pass.errors import ConfigError, LoweringError
from e2pass.lowering.joint import BATCH, ValueSpec, lower
from e2pass.lowering.partition import partition
from e2pass.plan import Decide, Region, RunRegion, Skip, ValueName
from e2pass.program import Program
from e2pass.report import CostReport, StepCost, price_step
from e2pass.runtime.gates import Gate, SLUGates
from e2pass.sites import Place, joint_nodes
from e2pass.training_graph import GraphNode, Rates, TrainingGraph

OPTIMIZERS: dict[str, int] = {
    "sgd": 0, "sgd_momentum": 1, "sgd_nesterov": 1, "adam": 2, "adamw": 2, "rmsprop": 1, "adagrad": 1,
}  # fmt: skip
"""Optimizers with a price, and how many state tensors each keeps for a parameter."""


class TrainingStep:
    """Builds and prices the step of one program.

    Attributes:
        cost_model: The board.
        loss: The caller's loss, None for cross-entropy on the first output.
        optimizer: Key of ``OPTIMIZERS``.
    """

    def __init__(self, cost_model: CostModel, loss: Callable[..., Tensor] | None = None, optimizer: Any = None) -> None:
        self.cost_model, self.loss = cost_model, loss
        self.optimizer = _optimizer_name(optimizer)

    def build(self, program: Program, diagnostics: Diagnostics) -> None:
        """Write ``program.step``: baseline and transformed nodes of the training step."""
        outside = _Outside(program, diagnostics)
        shared = [*outside.gradient_sums(), *self._loss(program, diagnostics), *self._update(program)]
        baseline, transformed = [], []
        for name, (before, after) in program.lowered.items():
            region = outside.regions[name]
            place = Place(name, region.paths, region.blocks)
            baseline += joint_nodes(before, place, outside.batch)
            transformed += joint_nodes(after, _gated(place, region), outside.batch)
        baseline += [*outside.merges(gated=False), *shared]
        transformed += [*outside.gates(), *outside.merges(gated=True), *shared]
        opaque = outside.unlowered()
        program.step = BuiltStep(self, [*baseline, *opaque], [*transformed, *opaque])

    def report(self, program: Program, rates: Rates | None = None, *, baseline_only: bool = False) -> CostReport:
        """Price both steps at ``rates``; the assumed ones by default."""
        rates = assumed_rates(program) if rates is None else rates
        step: BuiltStep = program.step
        after = None if baseline_only else step.price(step.transformed, rates)
        assumptions: dict[str, Any] = {
            "batch_size": program.inputs.batch_size,
            "loss": "cross-entropy on the first output" if self.loss is None else _name(self.loss),
            "optimizer": self.optimizer,
        }
        if not baseline_only:
            assumptions |= {
                "rates": rates.source,
                "mini-batches dropped": rates.drop,
                "gated blocks skipped": _mean(program, rates),
                "weight gradients predicted": _mean_use(rates),
            }
        assumptions |= dict(getattr(self.cost_model, "assumptions", {}))
        return CostReport(
            self.cost_model.name, step.price(step.baseline, Rates()), after, assumptions, self.cost_model.sources()
        )

    def _loss(self, program: Program, diagnostics: Diagnostics) -> list[GraphNode]:
        output = _first_output(program)
        if output is None or output.dim() == 0:
            diagnostics.info("E2P601", "", "the model returns its loss itself; none is added to the step")
            return []
        try:
            return _loss_nodes(program, output, self.loss)
        except LoweringError as error:
            diagnostics.warn("E2P602", "loss", f"the loss has no price: {error}", "pass loss=callable(output, target)")
            return []

    def _update(self, program: Program) -> list[GraphNode]:
        states = OPTIMIZERS[self.optimizer]
        nodes = []
        for name, parameter in program.model.named_parameters():
            if parameter.requires_grad:
                spec = TensorSpec(tuple(parameter.shape))
                site = OpSite(
                    f"update/{name}", f"optimizer.{self.optimizer}", (spec,) * (2 + states), (spec,),
                    region="update", layer=name.rpartition(".")[0], phase=Phase.UPDATE,
                )  # fmt: skip
                nodes.append(GraphNode(site, "update"))
        return nodes


class BuiltStep:
    """The nodes of both steps."""

    def __init__(self, owner: TrainingStep, baseline: list[GraphNode], transformed: list[GraphNode]) -> None:
        self.owner, self.baseline, self.transformed = owner, baseline, transformed

    def price(self, nodes: list[GraphNode], rates: Rates) -> StepCost:
        """Price ``nodes`` at ``rates``."""
        return price_step((n.at(rates) for n in nodes), self.owner.cost_model)


def build_graph(program: Program) -> TrainingGraph:
    """The transformed step as one annotated graph."""
    rates = assumed_rates(program)
    step: BuiltStep = program.step
    priced = step.price(step.transformed, rates)
    halves = {name: partition(after) for name, (_, after) in program.lowered.items()}
    return TrainingGraph(step.transformed, halves, {row.name: row for row in priced.rows}, rates)


def assumed_rates(program: Program) -> Rates:
    """The configured targets: drop probability, skip ratio, and the paper's predictor use."""
    config = program.config
    drop = config.smd.p if config.smd is not None and "drops-batches" in program.facts else 0.0
    skip: dict[int, float] = {}
    if program.slu is not None:
        slu: SLUGates = program.slu
        share = {"open": 0.0, "closed": 1.0}.get(slu.kind, slu.target)
        skip = dict.fromkeys(range(len(slu.gates)), share)
    use = 0.6 if config.psg is not None and config.psg.beta > 0 else 1.0 if config.psg is not None else 0.0
    return Rates(drop, skip, {}, use)


def _gated(place: Place, region: Region) -> Place:
    return Place(place.region, place.paths, place.blocks, region.block)


class _Outside:
    """Operations that belong to no region's joint graph."""

    def __init__(self, program: Program, diagnostics: Diagnostics) -> None:
        self.program, self.diagnostics = program, diagnostics
        self.batch = program.inputs.batch_size
        self.plan = program.plans["train"]
        self.regions = {r.name: r for r in self.plan.regions}
        self.values = {n.name: n for n in program.graphs["train"].graph.nodes}
        self.wants_grad = {
            name: spec.requires_grad for r in self.plan.regions for name, spec in zip(r.inputs, r.specs, strict=True)
        }

    def _spec(self, name: str) -> TensorSpec:
        value = self.values[name].meta["val"]
        return TensorSpec(tuple(self._size(s) for s in value.shape), value.dtype.itemsize * 8)

    def _size(self, size: Any) -> int:
        if isinstance(size, int):
            return size
        expression = size.node.expr
        return int(expression.subs(dict.fromkeys(expression.free_symbols, self.batch)))

    def _skips(self) -> list[Skip]:
        return [s for s in self.plan.steps if isinstance(s, Skip)]

    def merges(self, *, gated: bool) -> list[GraphNode]:
        """The additions that join bodies to shortcuts; gated ones also learn how much the body was worth."""
        nodes = []
        learned = self.program.slu is not None and self.program.slu.kind == "learned"
        for step in self._skips():
            block = str(self.values[step.out].meta["e2_block"])
            out = self._spec(step.out)
            place: dict[str, Any] = {"region": "merge", "layer": block, "block": block}
            gate = step.index if gated else None
            name = f"merge/{step.out}"
            join = OpSite(name, "aten.add.Tensor", (out, out), (out,), **place)
            nodes.append(GraphNode(join, "slu.merge" if gated else "", gate))
            if gated and learned:
                rows = TensorSpec((out.shape[0],))
                place |= {"phase": Phase.BACKWARD, "technique": Technique.SLU}
                worth = OpSite(f"{name}_worth", "aten.mul.Tensor", (out, out), (out,), **place)
                total = OpSite(f"{name}_sum", "aten.sum.dim_IntList", (out, (1,)), (rows,), **place)
                nodes += [GraphNode(worth, "slu.merge", gate), GraphNode(total, "slu.merge", gate)]
        return nodes

    def gradient_sums(self) -> list[GraphNode]:
        """A value that several regions read receives a gradient from each: autograd adds them."""
        readers: dict[str, list[int | None]] = {}
        for step in self.plan.steps:
            if isinstance(step, RunRegion):
                reads: list[tuple[str, int | None]] = [(n, None) for n in step.region.inputs]
            elif isinstance(step, Skip):
                reads = [(step.shortcut, None), *((n, step.index) for n in step.body.inputs)]
            else:
                continue
            for name, gate in reads:
                readers.setdefault(name, []).append(gate)
        nodes = []
        for name, gates in readers.items():
            if len(gates) < 2 or not self.wants_grad.get(name, False):
                continue
            spec = self._spec(name)
            ordered = sorted(gates, key=lambda g: g is not None)  # the first gradient needs no addition
            for i, gate in enumerate(ordered[1:]):
                site = OpSite(
                    f"gradient_sum/{name}_{i}", "aten.add.Tensor", (spec, spec), (spec,),
                    region="gradient_sum", phase=Phase.BACKWARD,
                )  # fmt: skip
                nodes.append(GraphNode(site, "", gate))
        return nodes

    def gates(self) -> list[GraphNode]:
        """The gate network of every block; open gates are priced like learned ones, as what neutral adds."""
        slu: SLUGates | None = self.program.slu
        if slu is None or slu.kind not in ("learned", "open"):
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
                    known[key] = _lower_gate(slu, gate, shape, step.previous is None, self.batch)
                block = str(self.values[step.out].meta["e2_block"])
                everywhere = _Always(block)
                place = Place(f"gate_{step.index}", everywhere, everywhere, None, Technique.SLU, "slu.gate")
                nodes += joint_nodes(known[key], place, self.batch)
        return nodes

    def unlowered(self) -> list[GraphNode]:
        """Regions without a joint graph: listed without a price, never as nothing."""
        nodes = []
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
        return nodes


class _Always(dict[str, str]):
    """A mapping that gives every key the same value."""

    def __init__(self, value: str) -> None:
        super().__init__()
        self.value = value

    def get(self, key: str, default: Any = None) -> Any:
        return self.value


class _GateMath(nn.Module):
    """What a gate computes, as the board would: pool, embed, LSTM cell, head, standardise, compare."""

    def __init__(self, slu: SLUGates, gate: Gate, first: bool, rank: int) -> None:
        super().__init__()
        self.gate, self.lstm, self.head, self.first = gate, slu.lstm, slu.head, first
        self.pooled = [d for d in range(1, rank) if d != gate.channel_dim]

    def forward(self, fork: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        features = self.gate.embed(fork.mean(self.pooled) if self.pooled else fork)
        h, c = self.lstm(features, None if self.first else (h, c))
        score = self.head(h).squeeze(1) - self.gate.logit_mean
        return score + self.gate.eagerness, h, c


class _LeafCell(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Linear | nn.LSTMCell)


def _lower_gate(slu: SLUGates, gate: Gate, shape: tuple[Any, ...], first: bool, batch: int) -> Any:
    root = _GateMath(slu, gate, first, len(shape))
    graph = _LeafCell().trace(root)
    hidden = slu.lstm.hidden_size
    specs = [ValueSpec(shape, torch.float32), *[ValueSpec((BATCH, hidden), torch.float32, not first)] * 2]
    return lower(fx.GraphModule(root, graph), specs, batch)


def _first_output(program: Program) -> Tensor | None:
    values = {n.name: n for n in program.graphs["train"].graph.nodes}
    for leaf in tree_leaves(program.plans["train"].output):
        if isinstance(leaf, ValueName) and isinstance(values[leaf.name].meta["val"], Tensor):
            found: Tensor = values[leaf.name].meta["val"]
            if found.is_floating_point():
                return found
    return None


class _CrossEntropy(nn.Module):
    def __init__(self, dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, output: Tensor, target: Tensor) -> tuple[Tensor]:
        if self.dims == 3:  # (B, T, classes): the classes come last
            output, target = output.flatten(0, 1), target.flatten()
        return (functional.cross_entropy(output, target),)


class _Custom(nn.Module):
    def __init__(self, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, output: Tensor, target: Tensor) -> tuple[Tensor]:
        return (self.loss(output, target),)


def _loss_nodes(program: Program, output: Tensor, loss: Callable[..., Tensor] | None) -> list[GraphNode]:
    batch = program.inputs.batch_size
    shape = (BATCH, *(int(s) for s in output.shape[1:]))
    labels = shape[:2] if len(shape) == 3 else (shape[0], *shape[2:])
    root: nn.Module = _Custom(loss) if loss is not None else _CrossEntropy(len(shape))
    targets = [ValueSpec(labels, torch.int64), ValueSpec(shape, output.dtype)]
    failure: Exception | None = None
    for target in targets:
        try:
            gm = fx.symbolic_trace(root)
            joint = lower(gm, [ValueSpec(shape, output.dtype, True), target], batch)
        except Exception as error:
            failure = error
            continue
        return joint_nodes(joint, Place("loss", {}, {}, phase=Phase.LOSS), batch)
    raise LoweringError(str(failure))


def _optimizer_name(optimizer: Any) -> str:
    if optimizer is None:
        return "sgd_momentum"
    name = optimizer if isinstance(optimizer, str) else type(optimizer).__name__.lower()
    if isinstance(optimizer, torch.optim.SGD):
        group = optimizer.param_groups[0]
        name = "sgd" if not group["momentum"] else "sgd_nesterov" if group["nesterov"] else "sgd_momentum"
    if name not in OPTIMIZERS:
        raise ConfigError(f"the update of optimizer {name!r} has no price; those that have are {', '.join(OPTIMIZERS)}")
    return name


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def _mean(program: Program, rates: Rates) -> float:
    if program.slu is None or not rates.skip:
        return 0.0
    weight = program.slu.weight.tolist()
    return float(sum(weight[i] * s for i, s in rates.skip.items()))


def _mean_use(rates: Rates) -> float:
    return sum(rates.use.values()) / len(rates.use) if rates.use else rates.default_use


def block_energy(program: Program, cost_model: CostModel) -> dict[int, float]:
    """Modelled joules of each gated body's forward, dX and dW in one baseline step, by gate index."""
    batch = program.inputs.batch_size
    energies: dict[int, float] = {}
    for region in program.plans["train"].regions:
        if region.block is None:
            continue
        joule = 0.0
        if region.name in program.lowered:
            nodes = joint_nodes(program.lowered[region.name][0], Place(region.name, {}, {}), batch)
            joule = price_step((n.site for n in nodes), cost_model).energy_j
        energies[region.block] = joule
    return energies
