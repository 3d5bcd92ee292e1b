"""Immediate dominators of a graph without cycles.

Where the operands of a join split is its immediate dominator. The general algorithm (Cooper, Harvey and Kennedy, "A
Simple, Fast Dominance Algorithm", 2001) walks up the dominator tree one step at a time, which is quadratic where many
long skips leave one chain. Without cycles, the immediate dominator of a node is simply the lowest common ancestor of
its predecessors in the tree built so far; with skewed jump pointers (Myers, "An Applicative Random-Access Stack", 1983)
that takes logarithmic time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

ROOT = -1
"""The virtual entry before all nodes without predecessors."""


class DominatorTree:
    """Dominators of nodes 0, 1, ... that are numbered in topological order."""

    def __init__(self, predecessors: Iterable[Sequence[int]]) -> None:
        """Build the tree; ``predecessors[i]`` holds numbers below ``i``, or none for what hangs off ``ROOT``."""
        # slot 0 is the root, slot i + 1 is node i
        self._parent = [0]
        self._jump = [0]
        self._depth = [0]
        for before in predecessors:
            self._append(self._meet([p + 1 for p in before]))

    def common(self, nodes: Iterable[int]) -> int:
        """Return the deepest node that dominates all of ``nodes`` (it may be one of them), or ``ROOT``."""
        return self._meet([n + 1 for n in nodes]) - 1

    def immediate(self, node: int) -> int:
        """Return the immediate dominator of a node, or ``ROOT``."""
        return self._parent[node + 1] - 1

    def _append(self, parent: int) -> None:
        up = self._jump[parent]
        even = self._depth[parent] - self._depth[up] == self._depth[up] - self._depth[self._jump[up]]
        self._parent.append(parent)
        self._depth.append(self._depth[parent] + 1)
        self._jump.append(self._jump[up] if even else parent)

    def _meet(self, slots: Sequence[int]) -> int:
        if not slots:
            return 0
        result = slots[0]
        for slot in slots[1:]:
            result = self._meet_two(result, slot)
        return result

    def _meet_two(self, a: int, b: int) -> int:
        depth, parent, jump = self._depth, self._parent, self._jump
        if depth[a] < depth[b]:
            a, b = b, a
        while depth[a] > depth[b]:
            a = jump[a] if depth[jump[a]] >= depth[b] else parent[a]
        while a != b:
            if jump[a] != jump[b]:
                a, b = jump[a], jump[b]
            else:
                a, b = parent[a], parent[b]
        return a
