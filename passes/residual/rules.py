"""The rules: when an addition joins a skip path with a body, and when a gate may skip that body.

A ``NoBodyError`` says that there is no region which could be left out. A *refusal* says that there is one, but that it
is not what is meant by a residual block (the user may ask for it by name). A *reservation* says that it is a residual
block which is better left alone.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from e2pass.passes.residual import operators, shapes, shortcut
from e2pass.passes.residual.activation_dag import ActivationDag
from e2pass.passes.residual.add_tree import AddTree
from e2pass.passes.residual.body import Body, NoBodyError, extract
from e2pass.passes.residual.dominators import ROOT
from e2pass.passes.residual.operators import Kind
from e2pass.passes.residual.shortcut import Path

IDENTITY, PROJECTION, NONLINEAR = "identity", "projection", "nonlinear"


@dataclass(frozen=True)
class Split:
    """How the operands of a join divide into one skip path and the arms of a body.

    Attributes:
        kind: ``identity``, ``projection`` or ``nonlinear``, after the skip path.
        fork: Where the paths part.
        shortcut: The operand that ends the skip path.
        arms: The other operands, from left to right.
        path: What the skip path does.
    """

    kind: str
    fork: int
    shortcut: int
    arms: tuple[int, ...]
    path: Path


@dataclass(frozen=True)
class Candidate:
    """A join with a removable body.

    Attributes:
        tree: The additions.
        split: Skip path and arms.
        body: What a closed gate would not run.
        refusal: Why it is no residual block, or ``""``.
        reservation: Why it should not be gated although it is one, or ``""``.
        possible: Whether a gate would be right if the user insisted.
        merges_scales: Whether it joins a map with one that was enlarged to its size.
    """

    tree: AddTree
    split: Split
    body: Body
    refusal: str
    reservation: str
    possible: bool
    merges_scales: bool


def judge(dag: ActivationDag, tree: AddTree, merges: Collection[int] = (), from_first: bool = False) -> Candidate:
    """Decide what a tree of additions is.

    Args:
        dag: The graph.
        tree: The additions.
        merges: Additions found so far that merge scales.
        from_first: The skip path can only be the operand that is computed first: ``x`` of ``x + f(x) + g(f(x))``, in
            which ``g`` alone forks off ``f(x)``.

    Raises:
        NoBodyError: If no region could be left out.
    """
    split = split_operands(dag, tree, from_first)
    body = extract(dag, split.fork, split.shortcut, tree.joins, split.arms)
    _check_memory(dag, tree, split, body)
    _check_scale(dag, tree, split)
    scales = _hourglass(dag, split, body, merges)
    refusal = _no_layer(dag, body) or _all_linear(dag, body) or scales or _loose_skip(dag, tree, split, body)
    obstacle = _rows(dag, split) or _scaled(dag, tree)
    reservation = obstacle or _skip_path(split)
    return Candidate(tree, split, body, refusal, reservation, possible=not obstacle, merges_scales=bool(scales))


def split_operands(dag: ActivationDag, tree: AddTree, from_first: bool = False) -> Split:
    """Find fork, skip path and arms.

    Raises:
        NoBodyError: If no operand is a skip path.
    """
    operands = tree.operands
    if len(set(operands)) < len(operands):
        raise NoBodyError("a value enters the sum twice")
    descending = sorted(operands, reverse=True)
    for fork in descending[-1:] if from_first else descending[1:]:
        if dag.reaches(fork, operands):
            return _split(dag, IDENTITY, fork, fork, operands)
    for operand in descending:
        origin = shortcut.strip(dag, operand)
        if origin != operand and dag.reaches(origin, [o for o in operands if o != operand]):
            return _split(dag, IDENTITY, origin, operand, operands)
    return _projection(dag, operands)


def _split(dag: ActivationDag, kind: str, fork: int, skip: int, operands: tuple[int, ...]) -> Split:
    return Split(kind, fork, skip, tuple(o for o in operands if o != skip), shortcut.trace(dag, fork, skip))


def _projection(dag: ActivationDag, operands: tuple[int, ...]) -> Split:
    fork = dag.dominators.common(operands)
    if fork == ROOT:
        raise NoBodyError("the operands have no common origin: they come from different inputs")
    origin, joined = dag.value(fork), dag.value(operands[0])
    if origin is None or joined is None or not origin.is_floating_point() or not shapes.same_rows(origin, joined):
        raise NoBodyError(
            f"the paths part at {dag.name(fork)}, which is no feature map with the rank and the rows of the sum"
        )
    paths = {o: shortcut.trace(dag, fork, o) for o in operands if shortcut.is_short(dag, fork, o)}
    paths = {o: p for o, p in paths.items() if p.whole and p.contractions <= shortcut.MAX_PROJECTION_LAYERS}
    linear = [o for o, p in paths.items() if p.plain]
    if len(linear) == len(operands):
        raise NoBodyError("all paths to the sum are linear: together they are one layer, not a body and a skip path")
    if len(linear) > 1:
        raise NoBodyError("more than one path to the sum is linear, so none of them is the skip path")
    if linear:
        return _split(dag, PROJECTION, fork, linear[0], operands)
    if not paths:
        raise NoBodyError("no operand is a skip path: each goes through several layers from where the paths part")
    fewest = min(paths, key=lambda o: paths[o].contractions)
    return _split(dag, NONLINEAR, fork, fewest, operands)


def _check_memory(dag: ActivationDag, tree: AddTree, split: Split, body: Body) -> None:
    """Refuse bodies that overwrite what is read outside of them: the skip path would see the change."""
    inside = set(body.nodes)
    for n in body.nodes:
        changed = [dag.storage_owner(p) for p in dag.mutated[n]]
        outside = [p for p in changed if p not in inside and dag.activation[p]]
        if outside:
            raise NoBodyError(
                f"{dag.name(n)} works in place on {dag.name(outside[0])}, which is read outside the body too"
            )
    for join in tree.joins:
        for p in dag.mutated[join]:
            changed_number = dag.storage_owner(p)
            later = [u for u in dag.live_users(changed_number) if u > join]
            if changed_number not in inside and changed_number not in tree.joins and later:
                raise NoBodyError(
                    f"the addition works in place on {dag.name(changed_number)}, which {dag.name(later[0])} reads later"
                )
    for user in dag.live_users(split.fork):
        if split.fork in dag.mutated[user] and user < tree.root and user not in inside and user not in tree.joins:
            raise NoBodyError(f"{dag.name(user)} works in place on the fork ({dag.name(split.fork)})")


def _check_scale(dag: ActivationDag, tree: AddTree, split: Split) -> None:
    for join in tree.joins:
        node = dag.nodes[join]
        right = node.args[1] if len(node.args) > 1 else node.kwargs.get("other")
        if operators.scale_of(node) != 1 and right is dag.nodes[split.shortcut]:
            raise NoBodyError(f"the addition multiplies its skip path by {operators.scale_of(node)}")


def _no_layer(dag: ActivationDag, body: Body) -> str:
    if any(dag.is_contraction(n) for n in body.nodes):
        return ""
    if any(dag.weighted[n] for n in body.nodes if dag.activation[n]):
        return "the body holds no convolution, linear layer or other weight matrix: there is nothing to save"
    return "the body holds no weights: it is arithmetic, not a layer"


def _all_linear(dag: ActivationDag, body: Body) -> str:
    bent = (n for n in body.nodes if dag.activation[n] and dag.live[n] and not shortcut.is_linear(dag, n))
    if any(dag.kind[n] is not Kind.MAX_POOL for n in bent):
        return ""
    return "the body is linear: together with the skip path it is one layer"


def _hourglass(dag: ActivationDag, split: Split, body: Body, merges: Collection[int]) -> str:
    """Refuse bodies without a path at constant or shrinking size.

    A path does not count if it uses the skip of an inner merge of scales: U-Nets are nested that way.
    """
    if split.path.enlarges:
        return "the skip path enlarges its feature map: a merge of scales (U-Net, feature pyramid)"
    clear = {split.fork, *(p for p in body.side_inputs if p > split.fork and dag.activation[p])}
    for n in body.nodes:
        blocked = n in merges or not dag.activation[n] or clear.isdisjoint(dag.before[n])
        if not blocked and not shortcut.enlarges(dag, n):
            clear.add(n)
    if any(arm in clear for arm in split.arms):
        return ""
    return "every path through the body ends by enlarging a smaller map: a merge of scales (U-Net, feature pyramid)"


def _loose_skip(dag: ActivationDag, tree: AddTree, split: Split, body: Body) -> str:
    """A skip path that pools, has no weights or is not linear proves little: demand that nothing else branches off.

    What such a path computes on its way may be read elsewhere (DLA hands its pooled input on) where it is linear but
    for max pools. The fork may be where the path is an identity or a projection in all but form.
    """
    if split.kind == IDENTITY or (split.kind == PROJECTION and split.path.contractions > 0 and not split.path.pools):
        return ""
    region = frozenset({*body.nodes, *split.path.nodes, *tree.joins})
    shared = set(split.path.nodes if split.kind == PROJECTION else ())
    if shortcut.rearranges(dag, split.path) or shortcut.is_preactivated(dag, split.path):
        shared.add(split.fork)
    if not shortcut.is_closed(dag, split.fork, region, {tree.root, *shared}):
        return f"other paths leave between {dag.name(split.fork)} and the sum: one of several merges, not a skip path"
    layers = sum(dag.is_contraction(n) for n in body.nodes)
    if split.path.contractions >= layers:
        return "no path to the sum is shorter than the other: parallel branches, not a body and a skip path"
    return ""


def _rows(dag: ActivationDag, split: Split) -> str:
    fork = dag.value(split.fork)
    if fork is not None and shapes.rows_are_samples(fork, dag.batch):
        return ""
    shown = shapes.text(fork, dag.batch) if fork is not None else "no tensor"
    return f"the rows of its input {shown} are not the samples of the batch, so that no sample can skip it"


def _skip_path(split: Split) -> str:
    if split.kind == NONLINEAR:
        return "its skip path is not linear: without the body it would be another layer, not a skip"
    return ""


def _scaled(dag: ActivationDag, tree: AddTree) -> str:
    for join in tree.joins:
        if operators.scale_of(dag.nodes[join]) != 1:
            return f"its addition scales the body by alpha={operators.scale_of(dag.nodes[join])}"
    return ""
