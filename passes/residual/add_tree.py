"""Maximal trees of additions: ``x + attention(h) + mlp(h)`` is one join with three operands."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import fx

from e2pass.passes.residual import shapes
from e2pass.passes.residual.activation_dag import ActivationDag
from e2pass.passes.residual.operators import op_name, scale_of

_ADDITIONS = frozenset({"add", "iadd"})

MAX_OPERANDS = 16
"""Longer sums are cut into pieces, so that trying the parts of a sum stays linear."""


@dataclass(frozen=True)
class AddTree:
    """A tree of additions with one output.

    Attributes:
        operands: The values that enter the tree, from left to right; one that enters twice is named twice.
        joins: The additions, in execution order; the last is the output.
    """

    operands: tuple[int, ...]
    joins: tuple[int, ...]

    @property
    def root(self) -> int:
        """The node that produces the sum."""
        return self.joins[-1]


def operands_of(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return the two operands of an addition of two values of the graph, else None."""
    if node.op not in ("call_function", "call_method") or op_name(node) not in _ADDITIONS:
        return None
    left = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))
    right = node.args[1] if len(node.args) > 1 else node.kwargs.get("other")
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    return left, right


def additions(dag: ActivationDag) -> tuple[dict[int, tuple[int, int]], dict[int, str]]:
    """Return the additions that may join two paths, with their operands, and why the other ones cannot.

    Additions of numbers, and those whose result nothing needs, are in neither.
    """
    joins: dict[int, tuple[int, int]] = {}
    others: dict[int, str] = {}
    for i, node in enumerate(dag.nodes):
        pair = operands_of(node) if dag.live[i] and dag.activation[i] else None
        if pair is None:
            continue
        left, right = dag.number[pair[0]], dag.number[pair[1]]
        why = _unfit(dag, i, left, right)
        if why is None:
            joins[i] = (left, right)
        elif why:
            others[i] = why
    return joins, others


def _unfit(dag: ActivationDag, node: int, left: int, right: int) -> str | None:
    """Return None for two activations of one shape, ``""`` for an operand that is a number, else the reason."""
    a, b, total = dag.value(left), dag.value(right), dag.value(node)
    if a is None or b is None or total is None:
        return ""
    constant = [p for p in (left, right) if not dag.activation[p]]
    if constant:
        table = a if constant[0] == left else b
        role = "a position embedding or other learned constant" if table.dim() > 1 else "a bias"
        role = role if dag.weighted[constant[0]] else "a position table, mask or other constant"
        return f"one operand ({dag.name(constant[0])}) does not depend on the input: {role}"
    if not total.is_floating_point():
        return f"the sum holds {total.dtype} numbers, not activations"
    if left == right:
        return f"both operands are the same value ({dag.name(left)})"
    if not (shapes.same_shape(a, total) and shapes.same_shape(b, total)):
        shown = f"{shapes.text(a, dag.batch)} and {shapes.text(b, dag.batch)}"
        return f"the operands have different shapes, {shown}: a mask or broadcast, not two paths"
    if not a.dtype == b.dtype == total.dtype:
        return f"the operands have different types, {a.dtype} and {b.dtype}"
    return None


def trees(dag: ActivationDag, joins: dict[int, tuple[int, int]]) -> list[AddTree]:
    """Return the maximal trees in execution order of their outputs."""
    absorbed: set[int] = set()
    found: list[AddTree] = []
    for root in sorted(joins, reverse=True):
        if root not in absorbed:
            tree = flatten(dag, joins, root, joins)
            absorbed.update(tree.joins)
            found.append(tree)
    return found[::-1]


def flatten(dag: ActivationDag, joins: dict[int, tuple[int, int]], root: int, within: Collection[int]) -> AddTree:
    """Return the tree under ``root``; additions that are not in ``within`` are operands of it, not parts."""
    inner: list[int] = [root]
    operands = list(joins[root])
    position = 0
    while position < len(operands):
        operand = operands[position]
        opens = operand in within and len(operands) < MAX_OPERANDS
        if opens and _is_plain_part(dag, operand):
            inner.append(operand)
            operands[position : position + 1] = joins[operand]
        else:
            position += 1
    return AddTree(tuple(operands), tuple(sorted(inner)))


def _is_plain_part(dag: ActivationDag, operand: int) -> bool:
    """Whether an addition feeds one other addition and nothing else, and neither scales an operand."""
    users = dag.live_users(operand)
    return len(users) == 1 and scale_of(dag.nodes[operand]) == 1 and scale_of(dag.nodes[users[0]]) == 1
