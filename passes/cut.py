"""Cutting a part out of a flat graph, and what its values look like for another number of samples."""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from e2pass.lowering.joint import BATCH, ValueSpec


class Cut:
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
        return not is_metadata(user) or any(self._leaves(u) for u in user.users)

    def build(self) -> fx.Graph:
        """The part as a graph of its own: its placeholders are ``inputs``, its results ``outputs``."""
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
        if is_metadata(node):
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
        ratio = self._derivable(node) if is_metadata(node) else None
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


def is_metadata(node: fx.Node) -> bool:
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


def batch_symbol(graph: fx.Graph) -> sympy.Symbol | None:
    """The symbol that counts samples; None where the batch size is fixed."""
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


def rows_of(spec: ValueSpec) -> int:
    """Rows per sample in dimension 0; 0 for a value that does not grow with the batch."""
    if not spec.shape or isinstance(spec.shape[0], int):
        return 0
    ratio = sympy.simplify(spec.shape[0] / BATCH)
    return int(ratio) if ratio.is_Integer else 0


def spec_of(node: fx.Node, symbol: sympy.Symbol | None, wants_grad: bool = False) -> ValueSpec:
    """What a node's value looks like for any number of samples, whose number ``symbol`` stands for."""
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        return ValueSpec((), torch.float32)
    shape = tuple(_dimension(s, symbol) for s in value.shape)
    return ValueSpec(shape, value.dtype, wants_grad and value.is_floating_point())
