"""What the analysis knows about residual blocks."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ResidualBlock:
    """A residual block: an addition that joins a skip path with the body that forked off it.

    Attributes:
        name: Longest common module path of the body, made unique; the join's node name where there is none.
        kind: ``identity`` (the skip is the fork itself), ``projection`` (a linear skip such as a 1x1 convolution) or
            ``nonlinear`` (the skip holds a nonlinearity; gated only on request).
        nodes: Names of the body's graph nodes, in execution order: what a closed gate does not run.
        gated: Whether a gate decides about this block.
        reason: Why it is not gated; ``""`` where it is.
        fork: Node whose value enters the body and the skip; the gate reads it.
        shortcut: Node whose value the skip path brings to the join: the fork itself, or the projection's output.
        arms: Nodes of the body whose values enter the addition tree, in the order of the tree.
        joins: Nodes of the addition tree; the last is the block's output.
        side_inputs: Nodes outside the body, other than the fork, that it reads (masks, rotary tables).
        channel_dim: Dimension of the fork that holds features; every other one but 0 is pooled for the gate.
        nested_in: Name of the enclosing block, if any.
    """

    name: str
    kind: str
    nodes: tuple[str, ...]
    gated: bool = True
    reason: str = ""
    fork: str = ""
    shortcut: str = ""
    arms: tuple[str, ...] = ()
    joins: tuple[str, ...] = ()
    side_inputs: tuple[str, ...] = ()
    channel_dim: int = 1
    nested_in: str | None = None

    @property
    def join(self) -> str:
        """Name of the node that produces the block's output."""
        return self.joins[-1]


@dataclass(frozen=True)
class RejectedJoin:
    """An addition that was looked at and is no residual block, and why."""

    node: str
    reason: str


@dataclass
class BlockSearch:
    """Result of the search: blocks in execution order, and the additions that are none."""

    blocks: list[ResidualBlock] = field(default_factory=list)
    rejected: list[RejectedJoin] = field(default_factory=list)
