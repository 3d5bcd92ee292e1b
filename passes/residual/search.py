"""The search: from a captured graph to its residual blocks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import fx

from e2pass.blocks import BlockSearch, RejectedJoin, ResidualBlock
from e2pass.errors import ConfigError
from e2pass.passes.residual import add_tree, describe, overrides, rules
from e2pass.passes.residual.activation_dag import ActivationDag
from e2pass.passes.residual.add_tree import AddTree
from e2pass.passes.residual.body import NoBodyError
from e2pass.passes.residual.rules import Candidate


def search(graph_module: fx.GraphModule, include: Iterable[str] = (), exclude: Iterable[str] = ()) -> BlockSearch:
    """Find the residual blocks of a captured graph.

    Blocks come in the order of their forks, so that a state threaded from gate to gate in this order never has to wait
    for a later gate. Only the innermost of nested blocks is gated.

    Args:
        graph_module: A flat graph; every node that makes a tensor carries its fake value, with a symbolic batch, in
            ``meta["val"]``, and the path of its module in ``meta["e2_path"]``.
        include: Blocks to gate although the search would not: names of blocks, of addition nodes, or module paths.
        exclude: Blocks to leave alone; a module path stands for all blocks in it.

    Returns:
        The blocks, and the additions that are none, each with the reason.

    Raises:
        ConfigError: If a name in ``include`` or ``exclude`` is unknown or cannot be skipped.
        PassError: If the graph has no shapes.
    """
    survey = _survey(ActivationDag(graph_module))
    names = describe.unique_names(survey.dag, survey.candidates)
    included, excluded = _chosen(survey, names, tuple(include), tuple(exclude))
    blocks: list[ResidualBlock] = []
    rejected = [RejectedJoin(survey.dag.name(n), why) for n, why in survey.rejected.items()]
    kept: list[int] = []
    for i, candidate in enumerate(survey.candidates):
        if candidate.refusal and i not in included:
            rejected.append(RejectedJoin(survey.dag.name(candidate.tree.root), candidate.refusal))
        else:
            kept.append(i)
            blocks.append(_block(survey.dag, candidate, names[i]))
    _settle(blocks, {k for k, i in enumerate(kept) if i in included}, {k for k, i in enumerate(kept) if i in excluded})
    order = {node.name: i for i, node in enumerate(graph_module.graph.nodes)}
    return BlockSearch(blocks, sorted(rejected, key=lambda r: order[r.node]))


@dataclass
class _Survey:
    """All that was looked at: joins with a removable body, and joins without one with the reason."""

    dag: ActivationDag
    joins: dict[int, tuple[int, int]]
    candidates: list[Candidate] = field(default_factory=list)
    rejected: dict[int, str] = field(default_factory=dict)
    merges: set[int] = field(default_factory=set)

    def examine(self, tree: AddTree) -> bool:
        """Judge a tree, or its parts where it is no block as a whole; return whether it is one as a whole."""
        outcome = self._judge(tree)
        if isinstance(outcome, Candidate) and not outcome.refusal:
            self.candidates.append(outcome)
            return True
        parts = [operand for operand in self.joins[tree.root] if operand in tree.joins]
        blocks = [p for p in parts if self.examine(add_tree.flatten(self.dag, self.joins, p, tree.joins))]
        if blocks:
            rest = frozenset(tree.joins).difference(blocks)
            outcome = self._judge(add_tree.flatten(self.dag, self.joins, tree.root, rest))
        elif isinstance(outcome, str) and len(tree.operands) > 2:
            chain = self._judge(tree, from_first=True)
            outcome = outcome if isinstance(chain, str) else chain
        if isinstance(outcome, Candidate):
            self.candidates.append(outcome)
            return not outcome.refusal
        self.rejected[tree.root] = outcome
        return False

    def _judge(self, tree: AddTree, from_first: bool = False) -> Candidate | str:
        try:
            candidate = rules.judge(self.dag, tree, self.merges, from_first)
        except NoBodyError as error:
            return str(error)
        if candidate.merges_scales:
            self.merges.add(tree.root)
        return candidate


def _survey(dag: ActivationDag) -> _Survey:
    joins, others = add_tree.additions(dag)
    survey = _Survey(dag, joins, rejected=others)
    for tree in add_tree.trees(dag, joins):
        survey.examine(tree)
    survey.candidates.sort(key=lambda c: (c.split.fork, c.tree.root))
    return survey


def _block(dag: ActivationDag, candidate: Candidate, name: str) -> ResidualBlock:
    split, body = candidate.split, candidate.body
    return ResidualBlock(
        name=name,
        kind=split.kind,
        nodes=tuple(map(dag.name, body.nodes)),
        gated=not candidate.reservation,
        reason=candidate.reservation,
        fork=dag.name(split.fork),
        shortcut=dag.name(split.shortcut),
        arms=tuple(map(dag.name, split.arms)),
        joins=tuple(map(dag.name, candidate.tree.joins)),
        side_inputs=tuple(map(dag.name, body.side_inputs)),
        channel_dim=describe.channel_dim(dag, candidate),
    )


def _settle(blocks: list[ResidualBlock], included: set[int], excluded: set[int]) -> None:
    """Mark nesting, then decide who is gated: at most one of a block and those in it."""
    innermost: dict[str, ResidualBlock] = {}
    for block in sorted(blocks, key=lambda b: len(b.nodes), reverse=True):
        block.nested_in = innermost[block.join].name if block.join in innermost else None
        innermost.update(dict.fromkeys(block.nodes, block))
    by_name = {block.name: block for block in blocks}
    inner = {block.nested_in: block for block in reversed(blocks) if block.nested_in}
    for block in blocks:
        if block.name in inner:
            block.gated, block.reason = False, block.reason or f"it contains the block {inner[block.name].name}"
    for i in excluded:
        blocks[i].gated, blocks[i].reason = False, "excluded by the user"
    for i in sorted(included, key=lambda i: -len(blocks[i].nodes)):
        blocks[i].gated, blocks[i].reason = True, ""
    for block in blocks:
        around = by_name.get(block.nested_in or "")
        while around is not None and not around.gated:
            around = by_name.get(around.nested_in or "")
        if around is not None and block.gated:
            block.gated, block.reason = False, f"it is part of {around.name}, which is gated as a whole"


def _chosen(
    survey: _Survey, names: list[str], include: tuple[str, ...], exclude: tuple[str, ...]
) -> tuple[set[int], set[int]]:
    """Return the candidates that the user includes and excludes."""
    if not include and not exclude:
        return set(), set()
    dag = survey.dag
    keys: dict[str, list[int]] = {}
    scopes: dict[str, list[int]] = {}
    for i, candidate in enumerate(survey.candidates):
        own = {names[i], describe.base_name(dag, candidate), *map(dag.name, candidate.tree.joins)}
        for key in own:
            keys.setdefault(key, []).append(i)
        parts = names[i].split(".")
        for k in range(1, len(parts)):
            scopes.setdefault(".".join(parts[:k]), []).append(i)
    refused = {dag.name(n): why for n, why in survey.rejected.items()}
    included = overrides.resolve(include, keys, refused, "include")
    excluded = overrides.resolve(exclude, {**scopes, **keys}, refused, "exclude")
    for i in sorted(included):
        if i in excluded:
            raise ConfigError(f"the block {names[i]!r} is both included and excluded; name it in one of the two")
        if not survey.candidates[i].possible:
            raise ConfigError(f"include: {names[i]!r} cannot be skipped: {survey.candidates[i].reservation}")
    return included, excluded
