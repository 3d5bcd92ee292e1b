"""The flow of activations: the values of a graph that depend on its input, and who reads them.

Nodes are numbered in execution order, so that every edge goes upwards and all walks are loops over numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

import torch
from torch import fx, nn

from e2pass.errors import PassError
from e2pass.passes.residual import operators, shapes
from e2pass.passes.residual.dominators import DominatorTree
from e2pass.passes.residual.operators import Kind

_WEIGHTED = frozenset({Kind.CONTRACTION, Kind.UP_CONTRACTION, Kind.OPAQUE})


class ActivationDag:
    """A captured graph as arrays over node numbers.

    Attributes:
        nodes: The graph's nodes in execution order.
        number: Number of each node.
        module: The module that a node runs, None for all but ``call_module`` nodes.
        kind: Kind of operation of each node.
        mutated: Numbers of the operands that a node changes in place.
        inputs: Numbers of all nodes that a node reads, each once.
        users: Numbers of all nodes that read a node.
        live: Whether the output, or an effect other than a check, needs the node.
        activation: Whether the value is one or more tensors that depend on a placeholder by value, not only by shape.
        before: The activations that a node reads the values of; empty for nodes that are no activation.
        weighted: Whether the node reads parameters, directly or through values that do not depend on the input.
        batch: Size of the first dimension of the model's input.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        """Analyse a graph whose nodes carry ``meta["val"]``.

        Raises:
            PassError: If no node has a recorded value.
        """
        self.nodes: list[fx.Node] = list(graph_module.graph.nodes)
        self.number = {node: i for i, node in enumerate(self.nodes)}
        placeholders = [node for node in self.nodes if node.op == "placeholder"]
        if placeholders and not any("val" in node.meta for node in self.nodes):
            raise PassError("the search for residual blocks needs shapes, and no node of the graph has meta['val']")
        self.module = [_module(graph_module, node) for node in self.nodes]
        self.kind = [operators.kind_of(node, self.module[i]) for i, node in enumerate(self.nodes)]
        self.mutated = [
            tuple(self.number[n] for n in operators.mutated_operands(node, self.module[i]))
            for i, node in enumerate(self.nodes)
        ]
        self.inputs = [tuple(self.number[n] for n in node.all_input_nodes) for node in self.nodes]
        self.users = [tuple(self.number[n] for n in node.users) for node in self.nodes]
        self.live = self._liveness()
        self.activation, self.before = self._activations()
        self.weighted = self._weights(graph_module)
        self.batch = shapes.batch_size(placeholders)

    @cached_property
    def dominators(self) -> DominatorTree:
        """Dominator tree over the activations; every other node hangs off the root."""
        return DominatorTree(self.before)

    @cached_property
    def counters(self) -> dict[str, list[int]]:
        """Nodes that nothing reads and that update a buffer in place, by the path of the buffer's module."""
        found: dict[str, list[int]] = {}
        for i, node in enumerate(self.nodes):
            changed = () if node.users else self.mutated[i]
            if changed and self.nodes[changed[0]].op == "get_attr":
                found.setdefault(self.owner(changed[0]), []).append(i)
        return found

    def owner(self, number: int) -> str:
        """Return the path of the module whose attribute a ``get_attr`` node reads."""
        return str(self.nodes[number].target).rpartition(".")[0]

    def value(self, number: int) -> torch.Tensor | None:
        """Return the recorded value of a node if it is one tensor."""
        return shapes.tensor_of(self.nodes[number])

    def name(self, number: int) -> str:
        """Return the name of a node."""
        return self.nodes[number].name

    def is_contraction(self, number: int) -> bool:
        """Whether a node is a layer that holds a weight matrix or a kernel (or was not traced into)."""
        return self.weighted[number] and self.kind[number] in _WEIGHTED

    def live_users(self, number: int) -> list[int]:
        """Return the users of a node that are needed."""
        return [user for user in self.users[number] if self.live[user]]

    def reaches(self, source: int, targets: Iterable[int]) -> bool:
        """Whether some target depends on ``source``; looks only at nodes numbered above ``source``."""
        stack, seen = [t for t in targets if t > source], set[int]()
        while stack:
            for p in self.before[stack.pop()]:
                if p == source:
                    return True
                if p > source and p not in seen:
                    seen.add(p)
                    stack.append(p)
        return False

    def between(self, source: int, targets: Iterable[int]) -> set[int]:
        """Return all activations on paths from ``source`` (left out) to ``targets`` (included)."""
        stack = [t for t in targets if t > source]
        seen = set(stack)
        while stack:
            for p in self.before[stack.pop()]:
                if p > source and p not in seen:
                    seen.add(p)
                    stack.append(p)
        found: set[int] = set()
        for number in sorted(seen):
            if any(p == source or p in found for p in self.before[number]):
                found.add(number)
        return found

    def storage_owner(self, number: int) -> int:
        """Follow views and in-place results back to the value whose memory a node may share."""
        while self.kind[number] in (Kind.MOVE, Kind.PASS) or self.mutated[number]:
            first = self.nodes[number].args[0] if self.nodes[number].args else None
            if not isinstance(first, fx.Node):
                break
            number = self.number[first]
        return number

    def _liveness(self) -> list[bool]:
        live = [False] * len(self.nodes)
        for i in range(len(self.nodes) - 1, -1, -1):
            node = self.nodes[i]
            needed = live[i] or node.op in ("output", "placeholder")
            if not needed and not node.users:
                needed = self.kind[i] is not Kind.CHECK and bool(self.mutated[i])
            if needed:
                live[i] = True
                for p in self.inputs[i]:
                    live[p] = True
        return live

    def _activations(self) -> tuple[list[bool], list[Sequence[int]]]:
        activation: list[bool] = []
        before: list[Sequence[int]] = []
        for i, node in enumerate(self.nodes):
            reads: list[int] = []
            if self.kind[i] is not Kind.SHAPE and (node.op == "output" or shapes.tensors_of(node)):
                reads = [p for p in self.inputs[i] if activation[p]]
            activation.append(bool(reads) or (node.op == "placeholder" and bool(shapes.tensors_of(node))))
            before.append(reads)
        return activation, before

    def _weights(self, owner: nn.Module) -> list[bool]:
        weighted: list[bool] = []
        for i, node in enumerate(self.nodes):
            through = any(weighted[p] and not self.activation[p] for p in self.inputs[i])
            weighted.append(through or _has_parameters(owner, node, self.module[i]))
        return weighted


def _module(owner: nn.Module, node: fx.Node) -> nn.Module | None:
    return owner.get_submodule(str(node.target)) if node.op == "call_module" else None


def _has_parameters(owner: nn.Module, node: fx.Node, module: nn.Module | None) -> bool:
    if module is not None:
        return next(module.parameters(), None) is not None
    if node.op != "get_attr":
        return False
    value: object = owner
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return isinstance(value, nn.Parameter)
