"""Who reads what in the training step, and what flows there."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from e2pass.cost import Phase
from e2pass.step.node import GraphNode


class EdgeKind(StrEnum):
    """What flows along an edge."""

    DATA = "data"  # the batch
    VALUE = "value"  # within the forward half, or within the loss
    GATE = "gate"  # a gate's decision, or the state that the next gate continues with
    SAVED = "saved"  # kept by forward for backward
    GRADIENT = "gradient"  # within the backward half
    UPDATE = "update"  # a gradient on its way into its parameter


@dataclass(frozen=True)
class Edge:
    """``target`` reads what ``source`` produced."""

    source: str
    target: str
    kind: EdgeKind


def kind_of(source: GraphNode, target: GraphNode) -> EdgeKind:
    """What flows from ``source`` to ``target``, which reads it."""
    if target.site.phase is Phase.UPDATE:
        return EdgeKind.UPDATE
    if source.site.phase is Phase.DATA:
        return EdgeKind.DATA
    if not target.in_forward and source.in_forward:
        return EdgeKind.VALUE if target.site.phase is Phase.LOSS else EdgeKind.SAVED
    if target.in_forward:
        crosses = source.site.region != target.site.region
        return EdgeKind.GATE if source.tag == "slu.gate" and crosses else EdgeKind.VALUE
    return EdgeKind.GRADIENT
