"""What an operand of a join does between the fork and the join."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import fx

from e2pass.passes.residual import shapes
from e2pass.passes.residual.activation_dag import ActivationDag
from e2pass.passes.residual.operators import Kind

_LINEAR = frozenset(
    {
        Kind.MOVE,
        Kind.PASS,
        Kind.DROPOUT,
        Kind.AVG_POOL,
        Kind.REDUCTION,
        Kind.RESIZE,
        Kind.SUM,
    }
)
_REARRANGING = frozenset({Kind.MOVE, Kind.PASS, Kind.REDUCTION, Kind.SUM})
_LINEAR_IN_ONE = frozenset({Kind.CONTRACTION, Kind.UP_CONTRACTION, Kind.BATCH_NORM, Kind.PRODUCT, Kind.QUOTIENT})
MAX_PROJECTION_LAYERS = 2


@dataclass(frozen=True)
class Path:
    """The region between a fork and one operand.

    Attributes:
        nodes: Its activations.
        contractions: How many of them are convolutions or linear layers.
        pools: Whether some of them are max pools.
        plain: Whether all that is not linear is a max pool or a norm beside a layer, as projections have them.
        enlarges: Whether some of them enlarge the feature map.
        whole: Whether the operand depends on the fork and on no other activation.
    """

    nodes: frozenset[int]
    contractions: int
    pools: bool
    plain: bool
    enlarges: bool
    whole: bool


def is_linear(dag: ActivationDag, number: int) -> bool:
    """Whether a node is linear in the activations that it reads."""
    kind = dag.kind[number]
    if kind in _LINEAR_IN_ONE:
        node = dag.nodes[number]
        operands = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, fx.Node)]
        read = [a for a in operands if dag.activation[dag.number[a]]]  # x * x reads x twice
        return len(read) <= 1 and (kind is not Kind.QUOTIENT or read == list(node.args[:1]))
    return kind in _LINEAR


def enlarges(dag: ActivationDag, number: int) -> bool:
    """Whether a node brings features to a larger map: transposed convolution, interpolation, unpooling, ..."""
    if dag.kind[number] not in (Kind.UP_CONTRACTION, Kind.RESIZE):
        return False
    result = dag.value(number)
    sources = [dag.value(p) for p in dag.before[number][:1]]
    if result is None or not sources or sources[0] is None or len(result.shape) != len(sources[0].shape):
        return True
    pairs = zip(result.shape[2:], sources[0].shape[2:], strict=True)
    return any((shapes.hint(after) or 0) > (shapes.hint(before) or 0) for after, before in pairs)


def trace(dag: ActivationDag, fork: int, operand: int) -> Path:
    """Return what stands between ``fork`` and ``operand``."""
    seen: set[int] = set()
    stack = [operand] if operand != fork else []
    whole = True
    while stack:
        n = stack.pop()
        if n in seen:
            continue
        if n < fork or not dag.before[n]:
            whole = False
            continue
        seen.add(n)
        stack.extend(p for p in dag.before[n] if p != fork)
    bent = {dag.kind[n] for n in seen if not is_linear(dag, n)}
    contractions = sum(dag.is_contraction(n) for n in seen)
    return Path(
        nodes=frozenset(seen),
        contractions=contractions,
        pools=Kind.MAX_POOL in bent,
        plain=bent <= ({Kind.MAX_POOL, Kind.NORM} if contractions else {Kind.MAX_POOL}),
        enlarges=any(enlarges(dag, n) for n in seen),
        whole=whole,
    )


def rearranges(dag: ActivationDag, path: Path) -> bool:
    """Whether a path is an identity of another width: it moves and adds values, and is never narrower than its end."""
    width = shapes.elements_per_row
    values = [dag.value(n) for n in sorted(path.nodes)]
    tensors = [value for value in values if value is not None]
    return (
        len(tensors) == len(values) > 0
        and all(dag.kind[n] in _REARRANGING for n in path.nodes)
        and all(width(value) >= width(tensors[-1]) for value in tensors)
    )


def is_preactivated(dag: ActivationDag, path: Path) -> bool:
    """Whether a path is one layer behind a norm and activation of its own, as in blocks with pre-activation."""
    layers = [n for n in path.nodes if dag.is_contraction(n)]
    bent = [n for n in path.nodes if not is_linear(dag, n)]
    return len(layers) == 1 and not path.pools and all(n < layers[0] for n in bent)


def is_short(dag: ActivationDag, fork: int, operand: int) -> bool:
    """Whether few layers stand between ``fork`` and ``operand``: decided without walking a long region."""
    seen: set[int] = set()
    stack = [operand]
    layers = 0
    while stack:
        n = stack.pop()
        if n in seen or n <= fork:
            continue
        seen.add(n)
        layers += dag.is_contraction(n)
        if layers > MAX_PROJECTION_LAYERS:
            return False
        stack.extend(dag.before[n])
    return True


def strip(dag: ActivationDag, operand: int) -> int:
    """Follow operations that hand their operand on unchanged (``nn.Identity``, ``clone``) back to its origin."""
    while dag.kind[operand] is Kind.PASS and len(dag.before[operand]) == 1:
        source = dag.before[operand][0]
        value, origin = dag.value(operand), dag.value(source)
        if value is None or origin is None or value.dtype != origin.dtype:
            break
        operand = source
    return operand


def is_closed(dag: ActivationDag, fork: int, inside: frozenset[int], exits: Collection[int]) -> bool:
    """Whether everything that reads the fork, or a value of ``inside`` that is none of ``exits``, is in ``inside``."""
    region = [n for n in (fork, *inside) if n not in exits]
    return all(u in inside for n in region for u in dag.live_users(n) if dag.activation[u])
