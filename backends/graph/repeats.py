"""Runs of equal stages of a training step: a stack of equal blocks is drawn once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from e2pass.step.graph import TrainingGraph
from e2pass.step.node import GraphNode

LONGEST_PERIOD = 16


@dataclass(frozen=True)
class Run:
    """``count`` times the ``period`` stages that begin with stage ``first``."""

    first: int
    period: int
    count: int


def find_runs(graph: TrainingGraph) -> list[Run]:
    """Return the runs of stages that do the same with the same shapes, one after the other."""
    stages = _stages(graph)
    known: dict[object, int] = {}
    return runs_in([known.setdefault(tuple(map(_sign, nodes)), len(known)) for nodes in stages])


def runs_in(signs: Sequence[int]) -> list[Run]:
    """Return the runs in a sequence of signs; where several begin at one place, the one that covers most."""
    runs = []
    at = 0
    while at < len(signs):
        best = max((_run(signs, at, period) for period in range(1, LONGEST_PERIOD + 1)), key=_covered)
        if best.count > 1:
            runs.append(best)
        at += best.period * best.count if best.count > 1 else 1
    return runs


def representatives(graph: TrainingGraph, runs: Sequence[Run]) -> dict[str, str]:
    """Map every node of a run to the node of its first repetition that does the same."""
    stages = _stages(graph)
    found: dict[str, str] = {}
    for run in runs:
        for stage in range(run.first, run.first + run.period * run.count):
            first = run.first + (stage - run.first) % run.period
            for node, twin in zip(stages[stage], stages[first], strict=True):
                found[node.name] = twin.name
    return found


def _stages(graph: TrainingGraph) -> list[list[GraphNode]]:
    stages: list[list[GraphNode]] = [[] for _ in range(max((n.stage for n in graph.nodes), default=-1) + 1)]
    for node in graph.nodes:
        if node.stage >= 0:
            stages[node.stage].append(node)
    return stages


def _sign(node: GraphNode) -> object:
    return node.site.op, node.site.outputs, node.tag, node.site.phase, node.gate is None, len(node.operands)


def _run(signs: Sequence[int], at: int, period: int) -> Run:
    pattern, count = signs[at : at + period], 1
    while signs[at + count * period : at + (count + 1) * period] == pattern:
        count += 1
    return Run(at, period, count)


def _covered(run: Run) -> tuple[int, int]:
    return (run.count - 1) * run.period, -run.period
