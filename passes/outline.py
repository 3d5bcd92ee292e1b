"""Outlines the flat graph into regions: the bodies of gated blocks, and the trunks between gates and merges.

The last of the forward rewrites. Parameters stay where they are: a region names modules and attributes of the owner.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx, nn

from e2pass.blocks import ResidualBlock
from e2pass.diagnostics import Diagnostics
from e2pass.parameters import gradient_flow
from e2pass.passes.base import Pass, PassResult
from e2pass.passes.cut import Cut, batch_symbol, is_metadata, rows_of, spec_of
from e2pass.plan import Beside, Decide, Plan, Region, RunRegion, Skip, Step, ValueName
from e2pass.program import Program


@dataclass(frozen=True)
class Outline(Pass):
    """No options."""

    name: ClassVar[str] = "outline"
    needs: ClassVar[frozenset[str]] = frozenset({"captured", "blocks"})
    establishes: ClassVar[frozenset[str]] = frozenset({"regions"})

    def run(self, program: Program) -> PassResult:
        """Write ``program.plans``; the flat graphs stay as they are, for export and as the reference."""
        learn = program.slu is not None and program.slu.kind == "learned"
        for mode, gm in program.unique_graphs():
            _keep_results_together(gm.graph)
            program.plans[mode] = _Outliner(program.model, gm, program.blocks[mode], learn).plan()
        program.plans.setdefault("eval", program.plans["train"])
        diagnostics = Diagnostics()
        count = len(program.plans["train"].regions)
        diagnostics.info("E2P300", "", f"outlined into {count} region{'s' if count != 1 else ''}")
        return PassResult(program, True, diagnostics)


def _keep_results_together(graph: fx.Graph) -> None:
    """Move the picking of an operator's several results next to it: only tensors may cross a region's boundary."""
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if not isinstance(value, tuple | list) or node.meta.get("e2_tag") == "slu.gate":
            continue
        behind = node
        for user in list(node.users):
            if user.target is operator.getitem:
                behind.append(user)
                behind = user
                if "e2_body" in node.meta:
                    user.meta["e2_body"] = node.meta["e2_body"]


class _Outliner:
    """Cuts one flat graph."""

    def __init__(
        self, owner: nn.Module, gm: fx.GraphModule, blocks: Sequence[ResidualBlock], gates_learn: bool
    ) -> None:
        self.owner, self.gm, self.graph = owner, gm, gm.graph
        self.block_of = {n: b.name for b in blocks for n in b.nodes}
        self.symbol = batch_symbol(self.graph)
        self.wants_grad = gradient_flow(owner, self.graph, gates_learn)
        self.live = [n for n in self.graph.nodes if n.op not in ("placeholder", "output", "get_attr")]
        self.body: dict[int, list[fx.Node]] = {}
        for node in self.live:
            if "e2_body" in node.meta:
                self.body.setdefault(node.meta["e2_body"], []).append(node)
        self.trunks = 0

    def plan(self) -> Plan:
        steps: list[Step] = []
        segment: list[fx.Node] = []

        def close() -> None:
            if segment:
                step = self._trunk(list(segment))
                if step is not None:
                    steps.append(step)
                segment.clear()

        for node in self.live:
            tag = node.meta.get("e2_tag")
            if tag == "slu.gate":
                close()
                steps.append(self._decide(node))
            elif tag == "slu.merge":
                close()
                steps.append(self._skip(node))
            elif "e2_body" not in node.meta and not is_metadata(node):
                segment.append(node)
        close()
        inputs = tuple(n.name for n in self.graph.find_nodes(op="placeholder"))
        output = _with_names(self.graph.output_node().args[0])
        beside = self._beside()
        return Plan(_with_releases(steps, output, beside), inputs, output, beside)

    def _beside(self) -> Beside:
        """Of what the model returns, all that no region computes."""
        returned = self.graph.output_node().all_input_nodes
        cut = Cut([n for n in returned if n.op == "get_attr" or is_metadata(n)], None)
        graph = cut.build()
        return Beside(graph, tuple(n.name for n in cut.inputs), tuple(n.name for n in cut.outputs))

    def _trunk(self, nodes: list[fx.Node]) -> RunRegion | None:
        region = self._region(f"trunk_{self.trunks}", nodes, None)
        self.trunks += 1
        return RunRegion(region)

    def _decide(self, node: fx.Node) -> Decide:
        index, fork, previous = node.args
        assert isinstance(index, int)
        assert isinstance(fork, fx.Node)
        return Decide(index, fork.name, previous.name if isinstance(previous, fx.Node) else None, node.name)

    def _skip(self, node: fx.Node) -> Skip:
        shortcut, arms, gate = node.args
        assert isinstance(shortcut, fx.Node)
        assert isinstance(gate, fx.Node)
        results: Any = [arms] if isinstance(arms, fx.Node) else arms
        index = node.meta["e2_index"]
        name = "body_" + str(node.meta["e2_block"]).replace(".", "_")
        body = self._region(name, self.body[index], index, gate.args[1], results)  # type: ignore[arg-type]
        return Skip(index, body, gate.name, shortcut.name, node.name)

    def _region(
        self,
        name: str,
        nodes: list[fx.Node],
        block: int | None,
        fork: fx.Node | None = None,
        results: Sequence[fx.Node] = (),
    ) -> Region:
        cut = Cut(nodes, fork)
        if results:
            cut.outputs.sort(key=results.index)
        graph = cut.build()
        specs = tuple(spec_of(n, self.symbol, self.wants_grad[n]) for n in cut.inputs)
        return Region(
            name=name,
            graph=graph,
            inputs=tuple(n.name for n in cut.inputs),
            outputs=tuple(n.name for n in cut.outputs),
            specs=specs,
            rows=tuple(rows_of(s) for s in specs),
            block=block,
            needs_two=any(_one_value_per_sample(self.owner, n) for n in nodes),
            paths={copy.name: node.meta.get("e2_path", "") for node, copy in cut.copies.items()},
            blocks={c.name: self.block_of[n.name] for n, c in cut.copies.items() if n.name in self.block_of},
        )


def _with_names(output: Any) -> Any:
    """The model's output with names in place of nodes, and containers of the user's own kinds, not a graph's."""
    match output:
        case fx.Node():
            return ValueName(output.name)
        case dict():
            return {key: _with_names(value) for key, value in output.items()}
        case list():
            return [_with_names(value) for value in output]
        case tuple() if hasattr(output, "_fields"):
            return type(output)(*map(_with_names, output))
        case tuple() if type(output) is tuple:
            return tuple(map(_with_names, output))
    return output


def _one_value_per_sample(owner: nn.Module, node: fx.Node) -> bool:
    """Whether a node is a batch norm over values without spatial extent."""
    if node.op == "call_module":
        if not isinstance(owner.get_submodule(str(node.target)), nn.modules.batchnorm._BatchNorm):
            return False
    elif node.target is not torch.ops.aten.batch_norm.default:
        return False
    value = node.meta["val"]
    return all(isinstance(s, int) and s == 1 for s in value.shape[2:])


def _with_releases(steps: Iterable[Step], output: object, beside: Beside) -> tuple[Step, ...]:
    """Tell each step which values nobody needs after it, so that they can be freed."""
    needed = {v.name for v in torch.utils._pytree.tree_leaves(output) if isinstance(v, ValueName)} | {*beside.inputs}
    done: list[Step] = []
    for step in reversed(list(steps)):
        names = set(_reads(step)) | set(_writes(step))
        done.append(replace(step, release=tuple(sorted(names - needed))))
        needed |= names
    return tuple(reversed(done))


def _reads(step: Step) -> tuple[str, ...]:
    match step:
        case RunRegion(region=region):
            return region.inputs
        case Decide(fork=fork, previous=previous):
            return (fork, *([previous] if previous else []))
        case Skip(body=body, gate=gate, shortcut=shortcut):
            return (gate, shortcut, *body.inputs)
    raise AssertionError(step)


def _writes(step: Step) -> tuple[str, ...]:
    return step.region.outputs if isinstance(step, RunRegion) else (step.out,)
