"""Puts the training graph together: linked, described and priced operations of the original and the new step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace

from e2pass.cost import Technique
from e2pass.program import Program
from e2pass.report import CostReport
from e2pass.step.batch import DATA, SMD_NODE
from e2pass.step.cost import FreeOp, StepCost
from e2pass.step.graph import StepInfo, TrainingGraph, Writers
from e2pass.step.links import link
from e2pass.step.node import GraphNode
from e2pass.step.origin import describe
from e2pass.step.rates import Rates
from e2pass.step.training_step import BuiltStep, active, assumed_rates


def build_graph(program: Program, writers: Writers, report: Callable[[], CostReport]) -> TrainingGraph:
    """The transformed step as one annotated graph; it holds the original one to compare with.

    Args:
        program: As the pass ``price`` left it.
        writers: How the graph can be written.
        report: What both steps cost, for a page that shows it.
    """
    step: BuiltStep = program.step
    rates, acting = assumed_rates(program), active(program)
    before = _one(program, _plain(step.plain), (), rates, writers)
    after = _one(program, _present(step.rewritten, acting), acting, rates, writers)
    after.attach(before, report)
    return after


def _present(nodes: Iterable[GraphNode], techniques: Collection[str]) -> list[GraphNode]:
    return [n for n in nodes if n.site.technique is Technique.BASE or n.site.technique in techniques]


def _plain(nodes: Iterable[GraphNode]) -> list[GraphNode]:
    """The model's own operations, about which no gate decides."""
    tags = {"slu.merge": ""}
    return [replace(n, gate=None, tag=tags.get(n.tag, n.tag)) for n in _present(nodes, ())]


def _one(
    program: Program, nodes: list[GraphNode], techniques: Sequence[str], rates: Rates, writers: Writers
) -> TrainingGraph:
    step: BuiltStep = program.step
    joints = {name: pair["bits" in techniques] for name, pair in program.lowered.items()}
    linked = describe(program, link(program, nodes, joints | step.joints, techniques))
    cost_model = step.cost_model
    info = StepInfo(
        model=type(program.model).__name__,
        batch_size=program.inputs.batch_size,
        board=cost_model.name,
        rates=rates.only(techniques),
        sources=cost_model.sources(),
        blocks=program.blocks["train"],
        diagnostics=program.diagnostics,
    )
    batch = [node for node in linked if node.site.region == DATA]
    priced = step.price(techniques, rates)
    free = tuple(FreeOp(node.name, node.site.op, _free(node)) for node in batch)
    price = StepCost(priced.rows, (*free, *priced.free), priced.unpriced, priced.dram)
    return TrainingGraph(linked, info, price, joints, writers)


def _free(node: GraphNode) -> str:
    if node.name == SMD_NODE:
        return "the loader decides on the host, before the mini-batch is fetched"
    return "it arrives in off-chip memory; reading it is priced with the operations that do"
