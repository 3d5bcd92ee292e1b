"""Outlines the flat graph into regions: the bodies of gated blocks, and the trunks between gates and merges.

The last of the forward rewrites. Parameters stay where they are: a region names modules and attributes of the owner.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import sympy
import torch
from torch import Tensor, fx, nn

from e2pass.blocks import ResidualBlock
from e2pass.diagnostics import Diagnostics
from e2pass.lowering.joint import BATCH, ValueSpec
from e2pass.parameters import gradient_flow
from e2pass.passes.base import Pass, PassResult
from e2pass.plan import Decide, Plan, Region, RunRegion, Skip, Step, ValueName
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
        self.symbol = _batch_symbol(self.graph)
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
            elif "e2_body" not in node.meta and not _is_metadata(node):
                segment.append(node)
        close()
        inputs = tuple(n.name for n in self.graph.find_nodes(op="placeholder"))
        output = fx.node.map_arg(self.graph.output_node().args[0], _named)
        return Plan(_with_releases(steps, output), inputs, output)

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
        cut = _Cut(nodes, fork)
        if results:
            cut.outputs.sort(key=results.index)
        graph = cut.build()
        specs = tuple(self._spec(n) for n in cut.inputs)
        return Region(
            name=name,
            graph=graph,
            inputs=tuple(n.name for n in cut.inputs),
            outputs=tuple(n.name for n in cut.outputs),
            specs=specs,
            rows=tuple(_rows(s) for s in specs),
            block=block,
            needs_two=any(_one_value_per_sample(self.owner, n) for n in nodes),
            paths={copy.name: node.meta.get("e2_path", "") for node, copy in cut.copies.items()},
            blocks={c.name: self.block_of[n.name] for n, c in cut.copies.items() if n.name in self.block_of},
        )

    def _spec(self, node: fx.Node) -> ValueSpec:
        value = node.meta["val"]
        if not isinstance(value, Tensor):
            return ValueSpec((), torch.float32)
        shape = tuple(_dimension(s, self.symbol) for s in value.shape)
        return ValueSpec(shape, value.dtype, self.wants_grad[node] and value.is_floating_point())


def _named(node: fx.Node) -> Any:
    return ValueName(node.name)


class _Cut:
    """A set of nodes cut out of a graph: what flows in, what flows out, and a graph of its own."""

    def __init__(self, nodes: list[fx.Node], fork: fx.Node | None) -> None:
        self.nodes, self.fork = nodes, fork
        self.inside = set(nodes)
        self.inputs: list[fx.Node] = []
        self.outputs = [n for n in nodes if any(self._leaves(u) for u in n.users)]
        self.copies: dict[fx.Node, fx.Node] = {}
        self.graph = fx.Graph()

    def _leaves(self, user: fx.Node) -> bool:
        """Whether ``user``, or what it only passes on as a size, lies outside."""
        if user in self.inside:
            return False
        return not _is_metadata(user) or any(self._leaves(u) for u in user.users)

    def build(self) -> fx.Graph:
        for node in self.nodes:
            for operand in node.all_input_nodes:
                self._collect(operand)
        for node in self.inputs:
            self.copies[node] = self.graph.placeholder(node.name)
            self.copies[node].meta = dict(node.meta)
        for node in self.nodes:
            self._copy(node)
        outputs = tuple(self.copies[n] for n in self.outputs)
        self.graph.output(outputs)
        self.graph.lint()
        return self.graph

    def _collect(self, node: fx.Node) -> None:
        """Find the values that must come from outside; attributes and sizes are fetched or derived inside."""
        if node in self.inside or node in self.inputs or node.op == "get_attr":
            return
        if _is_metadata(node):
            derivable = self._derivable(node) is not None
            for operand in [self.fork] if derivable and self.fork is not None else node.all_input_nodes:
                self._collect(operand)
            return
        self.inputs.append(node)

    def _derivable(self, node: fx.Node) -> sympy.Expr | None:
        """The multiple of the fork's batch size that ``node`` is: then a gathered body re-derives it from its own."""
        value = node.meta.get("val")
        if self.fork is None or not isinstance(value, torch.SymInt):
            return None
        rows = self.fork.meta["val"].shape[0]
        if not isinstance(rows, torch.SymInt):
            return None
        ratio = sympy.simplify(value.node.expr / rows.node.expr)
        return ratio if ratio.is_Integer else None

    def _copy(self, node: fx.Node) -> fx.Node:
        if node in self.copies:
            return self.copies[node]
        for operand in node.all_input_nodes:
            if operand not in self.copies:
                self._fetch(operand)
        self.copies[node] = self.graph.node_copy(node, self.copies.__getitem__)
        return self.copies[node]

    def _fetch(self, node: fx.Node) -> None:
        ratio = self._derivable(node) if _is_metadata(node) else None
        if ratio is None:
            self._copy(node)
            return
        assert self.fork is not None
        size = self.graph.call_function(torch.ops.aten.sym_size.int, (self.copies[self.fork], 0))
        size.meta = {**node.meta, "val": self.fork.meta["val"].shape[0]}
        if ratio != 1:
            size = self.graph.call_function(operator.mul, (size, int(ratio)))
            size.meta = dict(node.meta)
        self.copies[node] = size


def _is_metadata(node: fx.Node) -> bool:
    """Whether a node yields sizes, dtypes or devices rather than tensors: cheap, pure, copied to where it is used."""
    if node.op == "output":
        return False
    if node.op in ("placeholder", "get_attr") or node.meta.get("e2_tag") == "slu.gate":
        return False
    value = node.meta.get("val")
    if value is None:
        return False
    leaves = torch.utils._pytree.tree_leaves(value)
    return not any(isinstance(v, Tensor) for v in leaves)


def _batch_symbol(graph: fx.Graph) -> sympy.Symbol | None:
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        if isinstance(value, Tensor) and value.dim() and isinstance(value.shape[0], torch.SymInt):
            symbols = value.shape[0].node.expr.free_symbols
            if len(symbols) == 1:
                return next(iter(symbols))
    return None


def _dimension(size: Any, symbol: sympy.Symbol | None) -> int | sympy.Expr:
    if isinstance(size, int):
        return size
    expression = size.node.expr
    if symbol is None or expression.free_symbols - {symbol}:
        return int(size.node.hint)
    return int(expression) if expression.is_Integer else expression.subs(symbol, BATCH)


def _rows(spec: ValueSpec) -> int:
    """Rows per sample in dimension 0; 0 for a value that does not grow with the batch."""
    if not spec.shape or isinstance(spec.shape[0], int):
        return 0
    ratio = sympy.simplify(spec.shape[0] / BATCH)
    return int(ratio) if ratio.is_Integer else 0


def _one_value_per_sample(owner: nn.Module, node: fx.Node) -> bool:
    """Whether a node is a batch norm over values without spatial extent."""
    if node.op == "call_module":
        if not isinstance(owner.get_submodule(str(node.target)), nn.modules.batchnorm._BatchNorm):
            return False
    elif node.target is not torch.ops.aten.batch_norm.default and node.target is not nn.functional.batch_norm:
        return False
    value = node.meta["val"]
    return all(isinstance(s, int) and s == 1 for s in value.shape[2:])


def _with_releases(steps: Iterable[Step], output: object) -> tuple[Step, ...]:
    """Tell each step which values nobody needs after it, so that they can be freed."""
    needed = {v.name for v in torch.utils._pytree.tree_leaves(output) if isinstance(v, ValueName)}
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
