"""SLU: a gate, a tagged body and a merge for every gated block; the graph stays flat and runs in masked form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from e2pass.blocks import ResidualBlock
from e2pass.config import GateKind, GatePer, Survival
from e2pass.diagnostics import Diagnostics
from e2pass.parameters import gradient_flow
from e2pass.passes.base import Pass, PassResult
from e2pass.passes.mixing import obstacles
from e2pass.passes.residual.add_tree import operands_of
from e2pass.program import Program
from e2pass.runtime.gates import SLUGates
from e2pass.runtime.merge import merge_masked

GATES = "e2_slu"


@dataclass(frozen=True)
class InsertGates(Pass):
    """Options are those of ``e2pass.SLU``, but for the blocks' names, which are the search's."""

    skip: float = 0.4
    gate: GateKind = "learned"
    hidden: int = 10
    inject: bool = True
    seed: int = 0
    per: GatePer = "sample"
    survival: Survival = "constant"
    min_active: int = 0
    projections: bool = True

    name: ClassVar[str] = "insert-gates"
    needs: ClassVar[frozenset[str]] = frozenset({"captured", "blocks"})
    establishes: ClassVar[frozenset[str]] = frozenset({"gates"})

    def run(self, program: Program) -> PassResult:
        """Insert gate and merge nodes into every mode's graph and create the gates."""
        train = program.graphs["train"].graph
        nodes = {n.name: n for n in train.nodes}
        diagnostics = Diagnostics()
        found = any(block.gated for block in program.blocks["train"])
        self._leave_alone(program, nodes, diagnostics)
        gated = [i for i, block in enumerate(program.blocks["train"]) if block.gated]
        if found and not gated:
            reason = next(d.message for d in diagnostics if d.code == "E2P211")
            diagnostics.warn("E2P212", GATES, f"no block is gated, so SLU has nothing to skip; the first is a {reason}")
        if not gated:
            return PassResult(program, False, diagnostics)
        gated.sort(key=lambda i: nodes[program.blocks["train"][i].fork])
        features = [_features(nodes, program.blocks["train"][i]) for i in gated]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            program.slu = SLUGates(
                features,
                self.hidden,
                self.gate,
                self.skip,
                inject=self.inject,
                seed=self.seed,
                per=self.per,
                survival=self.survival,
                min_active=self.min_active,
            )
        for mode, gm in program.unique_graphs():
            renamed = _insert(gm, [program.blocks[mode][i] for i in gated], program.slu)
            order = {node.name: i for i, node in enumerate(gm.graph.nodes)}
            for block in program.blocks[mode]:
                _rename(block, renamed, order)
        diagnostics.info("E2P210", GATES, f"{len(gated)} {self.gate} gates, target skip ratio {self.skip:.0%}")
        return PassResult(program, True, diagnostics)

    def _leave_alone(self, program: Program, nodes: dict[str, fx.Node], diagnostics: Diagnostics) -> None:
        """Frozen blocks: a gate would be the only reason for backward to go there. And projections, if so wished.

        And bodies that only a whole batch can run, unless all samples decide alike.
        """
        flow = gradient_flow(program.model, program.graphs["train"].graph)
        pairs = list(zip(program.blocks["train"], program.blocks["eval"], strict=True))
        alone = obstacles(program) if self.per == "sample" else [""] * len(pairs)
        for (block, partner), obstacle in zip(pairs, alone, strict=True):
            if not block.gated:
                continue
            reason = obstacle
            if not flow[nodes[block.join]]:
                reason = "nothing in it or before it is trained"
            elif block.kind == "projection" and not self.projections:
                reason = "its skip path is a projection, and projections=False"
            if reason:
                block.gated = partner.gated = False
                block.reason = partner.reason = reason
                diagnostics.info("E2P211", block.name, f"residual block that is not gated: {reason}")


def _features(nodes: dict[str, fx.Node], block: ResidualBlock) -> tuple[int, int]:
    return int(nodes[block.fork].meta["val"].shape[block.channel_dim]), block.channel_dim


def _rename(block: ResidualBlock, renamed: dict[str, str], order: dict[str, int]) -> None:
    """Follow the joins that became merges; those of a gated block that only join arms are part of its body now."""
    if block.gated:
        inner = [name for name in block.joins if name not in renamed]
        present = {order[renamed.get(name) or name]: name for name in (*block.nodes, *inner)}
        block.nodes = tuple(present[i] for i in sorted(present))
        block.joins = tuple(name for name in block.joins if name in renamed)
    block.fork = renamed.get(block.fork, block.fork)
    block.shortcut = renamed.get(block.shortcut, block.shortcut)
    for name in ("nodes", "arms", "joins", "side_inputs"):
        setattr(block, name, tuple(dict.fromkeys(renamed.get(n, n) for n in getattr(block, name))))


def _insert(gm: fx.GraphModule, blocks: list[ResidualBlock], slu: SLUGates) -> dict[str, str]:
    """Insert all gates; returns the merge that took the place of each addition."""
    nodes = {n.name: n for n in gm.graph.nodes}
    previous: fx.Node | None = None
    for index, block in enumerate(blocks):
        previous = _insert_one(gm.graph, nodes, block, index, previous)
    renamed = {old: node.name for old, node in nodes.items() if old != node.name}
    gm._modules = {**gm._modules, GATES: slu}  # the shell's own registry: the caller's module gains no child
    gm.recompile()
    return renamed


def _insert_one(
    graph: fx.Graph, nodes: dict[str, fx.Node], block: ResidualBlock, index: int, previous: fx.Node | None
) -> fx.Node:
    fork = nodes[block.fork]
    shortcut = nodes[block.shortcut]
    place: dict[str, Any] = {"e2_block": block.name, "e2_path": block.name}
    # A gate needs its fork and the state of the gate before it.
    anchor = fork if previous is None or previous < fork else previous
    with graph.inserting_before(_behind(anchor)):
        gate = graph.create_node("call_module", GATES, (index, fork, previous), {}, name=f"slu_gate_{index}")
    batch = fork.meta["val"].new_empty(fork.meta["val"].shape[:1], dtype=torch.float32)
    gate.meta = {**place, "val": (batch, batch, batch), "e2_tag": "slu.gate", "e2_technique": "slu"}
    join = nodes[block.join]
    arms = _along_the_skip(nodes, block)
    with graph.inserting_before(join):
        body = tuple(arms.values()) if len(arms) > 1 else arms[join]
        merge = graph.create_node("call_function", merge_masked, (shortcut, body, gate), {}, name=f"slu_merge_{index}")
    merge.meta = {**join.meta, **place, "e2_tag": "slu.merge", "e2_technique": "slu", "e2_index": index}
    for name in (*block.nodes, *(name for name in block.joins if nodes[name] not in arms)):
        nodes[name].meta["e2_block"] = block.name
        nodes[name].meta["e2_body"] = index
    join.replace_all_uses_with(merge)
    for name in reversed(block.joins):
        if nodes[name] in arms:
            graph.erase_node(nodes[name])
            nodes[name] = merge
    return gate


def _along_the_skip(nodes: dict[str, fx.Node], block: ResidualBlock) -> dict[fx.Node, fx.Node]:
    """The additions from the shortcut to the sum, in this order, each with what it adds; other ones join arms only.

    The merge keeps this order, so with the gate open a sum of several arms is the model's to the last bit.
    """
    reached, arms = nodes[block.shortcut], dict[fx.Node, fx.Node]()
    for name in block.joins:
        left, right = operands_of(nodes[name]) or (None, None)
        if reached in (left, right):
            added = right if left is reached else left
            assert added is not None
            arms[nodes[name]] = added
            reached = nodes[name]
    return arms


def _behind(node: fx.Node) -> fx.Node:
    """The first node behind ``node`` that is no placeholder."""
    following = node.next
    while following.op == "placeholder":
        following = following.next
    return following
