"""What a block is called, and which dimension of its input holds features."""

from __future__ import annotations

from torch import fx

from e2pass.passes.residual import operators, shapes
from e2pass.passes.residual.activation_dag import ActivationDag
from e2pass.passes.residual.operators import Kind
from e2pass.passes.residual.rules import Candidate


def module_path(node: fx.Node) -> str:
    """Return the path of the module that a node runs or was traced in, ``""`` for the root or if unknown."""
    if node.op == "call_module":
        return str(node.target)
    return str(node.meta.get("e2_path") or "")


def base_name(dag: ActivationDag, candidate: Candidate) -> str:
    """Return the longest module path that all layers of the body share, else the name of the join's node."""
    paths = [module_path(dag.nodes[n]).split(".") for n in candidate.body.nodes if dag.is_contraction(n)]
    shared: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared) or dag.name(candidate.tree.root)


def unique_names(dag: ActivationDag, candidates: list[Candidate]) -> list[str]:
    """Name all candidates; the second with the same path is ``path#2``."""
    counts: dict[str, int] = {}
    names: list[str] = []
    for candidate in candidates:
        name = base_name(dag, candidate)
        counts[name] = counts.get(name, 0) + 1
        names.append(name if counts[name] == 1 else f"{name}#{counts[name]}")
    return names


def channel_dim(dag: ActivationDag, candidate: Candidate) -> int:
    """Return the dimension of the fork that the body's first layer sees as features."""
    fork = dag.value(candidate.split.fork)
    if fork is None or len(fork.shape) <= 2:
        return 1
    first = next((n for n in candidate.body.nodes if dag.activation[n] and dag.weighted[n]), None)
    source = dag.before[first][0] if first is not None else candidate.split.fork
    value = dag.value(source)
    if first is None or value is None:
        return 1 if len(fork.shape) > 3 else len(fork.shape) - 1
    dim = _feature_dim(dag, first, value.dim())
    features = shapes.hint(value.shape[dim])
    while source > candidate.split.fork and dag.before[source]:
        dim = _dim_before(dag.nodes[source], dim)
        source = dag.before[source][0]
    if dim < 0 or dim >= len(fork.shape) or shapes.hint(fork.shape[dim]) != features:
        dim = next((d for d in range(1, len(fork.shape)) if shapes.hint(fork.shape[d]) == features), 1)
    return max(dim, 1)


def _feature_dim(dag: ActivationDag, number: int, rank: int) -> int:
    """Return the dimension of its operand that a layer treats as features."""
    kind, node = dag.kind[number], dag.nodes[number]
    module = dag.module[number]
    name = type(module).__name__.lower() if module is not None else operators.op_name(node)
    if kind is Kind.BATCH_NORM or "conv" in name or "group" in name or "instance" in name:
        return 1
    if kind is Kind.NORM:
        over = getattr(module, "normalized_shape", None) or (node.args[1] if len(node.args) > 1 else (1,))
        return rank - len(over) if isinstance(over, (tuple, list)) else rank - 1
    return rank - 1


def _dim_before(node: fx.Node, dim: int) -> int:
    """Return where dimension ``dim`` of a node's result was in its first operand."""
    name = operators.op_name(node)
    result = shapes.tensor_of(node)
    rank = result.dim() if result is not None else 0
    if name == "permute":
        order = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
        return int(order[dim]) % rank  # type: ignore[arg-type]
    if name in ("transpose", "swapaxes"):
        one, other = (int(a) % rank for a in node.args[1:3])  # type: ignore[arg-type]
        return {one: other, other: one}.get(dim, dim)
    return dim
