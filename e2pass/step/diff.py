"""What a transformation did to the training step: operations added, removed and replaced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from e2pass.dump import short_op
from e2pass.step.graph import TrainingGraph
from e2pass.step.node import GraphNode


@dataclass(frozen=True)
class Replacement:
    """An operation that is there before and after, but not the same.

    Attributes:
        before: As it was.
        after: As it is.
        changes: Each difference in words.
    """

    before: GraphNode
    after: GraphNode
    changes: tuple[str, ...]


@dataclass(frozen=True)
class GraphDiff:
    """The difference of two training steps.

    Attributes:
        added: Operations that only the second has, in its order.
        removed: Operations that only the first has, in its order.
        replaced: Operations of both that changed, in the order of the second.
        kept: Number of operations that did not change.
    """

    added: tuple[GraphNode, ...]
    removed: tuple[GraphNode, ...]
    replaced: tuple[Replacement, ...]
    kept: int

    @property
    def empty(self) -> bool:
        """Whether the steps are the same."""
        return not (self.added or self.removed or self.replaced)

    def summary(self) -> list[tuple[str, str, int]]:
        """Change, what it was for (or what of it changed), and how many times: ``("added", "psg.msb", 36)``."""
        counts: Counter[tuple[str, str]] = Counter()
        counts.update(("added", _purpose(node)) for node in self.added)
        counts.update(("removed", _purpose(node)) for node in self.removed)
        counts.update(("replaced", kind) for item in self.replaced for kind in {_kind(c) for c in item.changes})
        return [(change, what, n) for (change, what), n in sorted(counts.items())]

    @property
    def counts(self) -> str:
        """How many operations were added, removed, replaced and left as they are, in one line."""
        found = {"added": len(self.added), "removed": len(self.removed), "replaced": len(self.replaced)}
        return ", ".join(f"{count} {what}" for what, count in (found | {"unchanged": self.kept}).items())

    def to_text(self, most: int | None = None) -> str:
        """One line an operation: ``+`` added, ``-`` removed, ``~`` replaced, with what changed.

        Args:
            most: Lines of each of the three at the most, with a word on how many more there are; None is no limit.
        """
        kinds = {
            "removed": [f"- {_title(node)}" for node in self.removed],
            "added": [f"+ {_title(node)}" for node in self.added],
            "replaced": [f"~ %{item.after.name}: {'; '.join(item.changes)}" for item in self.replaced],
        }
        lines = [self.counts]
        for kind, found in kinds.items():
            lines += found[:most]
            if most is not None and len(found) > most:
                lines.append(f"... and {len(found) - most} more {kind}")
        return "\n".join(lines) + "\n"

    def __str__(self) -> str:
        return self.to_text()


def diff(original: TrainingGraph, transformed: TrainingGraph) -> GraphDiff:
    """Compare two training steps of the same model, operation by operation.

    Operations are matched by name: rewrites keep the names of what they leave, and never give one a second time.

    Args:
        original: The step as it was, such as ``t.graph.original``.
        transformed: The step as it is, such as ``t.graph``.
    """
    before = {node.name: node for node in original.nodes}
    after = {node.name: node for node in transformed.nodes}
    replaced = []
    for name, node in after.items():
        if name in before:
            changes = tuple(_changes(before[name], node))
            if changes:
                replaced.append(Replacement(before[name], node, changes))
    return GraphDiff(
        added=tuple(node for name, node in after.items() if name not in before),
        removed=tuple(node for name, node in before.items() if name not in after),
        replaced=tuple(replaced),
        kept=len(after.keys() & before.keys()) - len(replaced),
    )


def _changes(old: GraphNode, new: GraphNode) -> Iterator[str]:
    if old.site.op != new.site.op:
        yield f"op {old.site.op} -> {new.site.op}"
    if _types(old) != _types(new):
        yield f"type {_types(old)} -> {_types(new)}"
    if old.tag != new.tag:
        yield f"tag {new.tag or 'none'} instead of {old.tag or 'none'}"
    if old.gate != new.gate:
        yield _gating(old.gate, new.gate)
    lost = [f"%{name}" for name in old.operands if name not in new.operands]
    gained = [f"%{name}" for name in new.operands if name not in old.operands]
    if lost or gained:
        yield f"reads {', '.join(gained) or 'nothing'} instead of {', '.join(lost) or 'nothing'}"


def _gating(old: int | None, new: int | None) -> str:
    if new is None:
        return f"ungated: always runs, instead of only where gate {old} is open"
    return (
        f"gated: runs only where gate {new} is open, instead of {'always' if old is None else f'where gate {old} is'}"
    )


def _types(node: GraphNode) -> str:
    dtypes = node.dtypes or ("",) * len(node.outputs)
    return ", ".join(
        f"{dtype}{list(spec.shape)}:{spec.bits}" for dtype, spec in zip(dtypes, node.outputs, strict=False)
    )


def _kind(change: str) -> str:
    return change.partition(" ")[0].removesuffix(":")


def _purpose(node: GraphNode) -> str:
    return node.tag or f"{short_op(node.site.op)} ({node.made_by})"


def _title(node: GraphNode) -> str:
    return f"%{node.name} = {node.site.op}" + (f" {{{node.tag}}}" if node.tag else "")
