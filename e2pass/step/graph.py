"""One graph of the whole training step: every operation with its place, origin, width, probability and cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import fx

from e2pass.blocks import ResidualBlock
from e2pass.diagnostics import Diagnostics
from e2pass.errors import InputError
from e2pass.lowering.joint import Joint
from e2pass.lowering.partition import Halves, partition
from e2pass.step.cost import CostRow, FreeOp, StepCost, UnpricedOp
from e2pass.step.edges import Edge, kind_of
from e2pass.step.node import GraphNode
from e2pass.step.rates import Rates

if TYPE_CHECKING:
    import os

    import networkx as nx

    from e2pass.report import CostReport
    from e2pass.step.diff import GraphDiff

    File = str | os.PathLike[str] | None


class Writers(Protocol):
    """How a graph leaves the library; ``e2pass.backends.graph`` implements it, the public API injects it."""

    def text(self, graph: TrainingGraph) -> str:
        """Return a stable dump."""
        ...

    def networkx(self, graph: TrainingGraph) -> nx.DiGraph:
        """Return a directed graph with plain attributes."""
        ...

    def dot(self, graph: TrainingGraph, *, collapse: bool, results: bool) -> str:
        """Return Graphviz source."""
        ...

    def svg(self, graph: TrainingGraph, *, collapse: bool, results: bool) -> str:
        """Return what Graphviz draws of that."""
        ...

    def html(self, graph: TrainingGraph, report: CostReport | None) -> str:
        """Return a page that needs nothing else."""
        ...


@dataclass(frozen=True)
class StepInfo:
    """What is known about the step as a whole.

    Attributes:
        model: Class of the user's model.
        batch_size: Samples in a mini-batch.
        board: Name of the cost model.
        rates: The rates that probabilities and costs are stated at.
        sources: Every number of the cost model by key, with where it comes from.
        blocks: Every residual block found, gated or not, with the reason.
        diagnostics: What was rewritten and what was not, each with a reason.
    """

    model: str
    batch_size: int
    board: str
    rates: Rates
    sources: Mapping[str, str] = field(default_factory=dict)
    blocks: Sequence[ResidualBlock] = ()
    diagnostics: Diagnostics = field(default_factory=Diagnostics)


class TrainingGraph:
    """The training step as one graph, in an order in which it can run.

    Attributes:
        nodes: Every operation; each stands behind those it reads.
        info: The step as a whole.
        price: Expected cost of each operation in one nominal step.
        joints: Joint forward+backward graph of each lowered region.
    """

    def __init__(
        self,
        nodes: Iterable[GraphNode],
        info: StepInfo,
        price: StepCost,
        joints: Mapping[str, Joint],
        writers: Writers,
    ) -> None:
        self.nodes, self.info, self.price, self.joints = list(nodes), info, price, joints
        self._writers = writers
        self._original: TrainingGraph | None = None
        self._report: Callable[[], CostReport] | None = None

    def attach(self, original: TrainingGraph, report: Callable[[], CostReport]) -> None:
        """Give the graph the step it came from, and a way to get the report on both."""
        self._original, self._report = original, report

    def __len__(self) -> int:
        """Number of operations."""
        return len(self.nodes)

    def __contains__(self, name: object) -> bool:
        """Whether there is an operation of this name."""
        return name in self._by_name

    def __getitem__(self, name: str) -> GraphNode:
        """The operation of this name.

        Raises:
            InputError: If there is none; similar names are given.
        """
        if name in self._by_name:
            return self._by_name[name]
        import difflib

        near = difflib.get_close_matches(name, self._by_name, n=3, cutoff=0.3)
        similar = f"similar names are {', '.join(near)}" if near else "no name is similar"
        raise InputError(f"the graph has no node {name!r}; {similar}")

    @property
    def rates(self) -> Rates:
        """The rates that probabilities and costs are stated at."""
        return self.info.rates

    @cached_property
    def _by_name(self) -> dict[str, GraphNode]:
        return {node.name: node for node in self.nodes}

    @cached_property
    def halves(self) -> dict[str, Halves]:
        """Forward and backward graph of each lowered region, as they run."""
        return {name: partition(joint) for name, joint in self.joints.items()}

    @property
    def forward(self) -> dict[str, fx.GraphModule]:
        """Forward graph of each region."""
        return {name: h.forward for name, h in self.halves.items()}

    @property
    def backward(self) -> dict[str, fx.GraphModule]:
        """Backward graph of each region."""
        return {name: h.backward for name, h in self.halves.items()}

    @cached_property
    def costs(self) -> dict[str, CostRow]:
        """Expected cost in one nominal step of each priced operation, by name."""
        return {row.name: row for row in self.price.rows}

    @cached_property
    def without_cost(self) -> dict[str, FreeOp | UnpricedOp]:
        """Operations that are free or have no formula, by name; each says why."""
        free: dict[str, FreeOp | UnpricedOp] = {op.name: op for op in self.price.free}
        return free | {op.name: op for op in self.price.unpriced}

    @cached_property
    def edges(self) -> list[Edge]:
        """Who reads what, between regions too, in the order of the readers."""
        known = self._by_name
        return [
            Edge(operand, node.name, kind_of(known[operand], node))
            for node in self.nodes
            for operand in node.operands
            if operand in known
        ]

    @cached_property
    def _readers(self) -> dict[str, list[str]]:
        readers: dict[str, list[str]] = {}
        for edge in self.edges:
            readers.setdefault(edge.source, []).append(edge.target)
        return readers

    def readers(self, name: str) -> list[str]:
        """Names of the operations that read what ``name`` produces."""
        return self._readers.get(name, [])

    def tagged(self, prefix: str) -> Iterator[GraphNode]:
        """Nodes whose tag starts with ``prefix``, e.g. ``psg``."""
        return (n for n in self.nodes if n.tag.startswith(prefix))

    def select(
        self,
        *,
        region: str | None = None,
        block: str | None = None,
        tag: str | None = None,
        path: str | None = None,
        phase: str | None = None,
        technique: str | None = None,
    ) -> TrainingGraph:
        """The part of the graph that fits every filter given; it can be written, drawn and filtered like the whole.

        Args:
            region: Name of a region.
            block: Name of a residual block.
            tag: A tag or the beginning of one up to a dot: ``psg`` finds ``psg.msb``.
            path: A module path or a prefix of one up to a dot: ``layer1`` finds ``layer1.0.conv1``.
            phase: One of ``e2pass.cost.Phase``.
            technique: One of ``e2pass.cost.Technique``.

        Raises:
            InputError: If nothing fits; the message lists what there is to choose from.
        """
        wanted = {"region": region, "block": block, "tag": tag, "path": path, "phase": phase, "technique": technique}
        filters = {key: value for key, value in wanted.items() if value is not None}
        kept = [n for n in self.nodes if all(_FILTERS[k](_label(n, k), v) for k, v in filters.items())]
        if not kept:
            key, value = next(((k, v) for k, v in filters.items() if not self._any(k, v)), ("", ""))
            if not key:
                asked = ", ".join(f"{k}={v!r}" for k, v in filters.items())
                raise InputError(f"the graph has no node with {asked}; each of them alone does fit some")
            choices = list(dict.fromkeys(_label(n, key) for n in self.nodes if _label(n, key)))
            more = f" and {len(choices) - 20} more" if len(choices) > 20 else ""
            raise InputError(f"the graph has no {key} {value!r}; it has {', '.join(choices[:20])}{more}")
        names = {n.name for n in kept}
        price = StepCost(
            tuple(r for r in self.price.rows if r.name in names),
            tuple(f for f in self.price.free if f.name in names),
            tuple(u for u in self.price.unpriced if u.name in names),
            self.price.dram,
        )
        joints = {r: j for r, j in self.joints.items() if any(n.site.region == r for n in kept)}
        return TrainingGraph(kept, self.info, price, joints, self._writers)

    def _any(self, key: str, value: str) -> bool:
        return any(_FILTERS[key](_label(n, key), value) for n in self.nodes)

    @property
    def has_original(self) -> bool:
        """Whether the step before any rewrite is known."""
        return self._original is not None

    @property
    def original(self) -> TrainingGraph:
        """The same step before any rewrite.

        Raises:
            InputError: For an original itself, and for a part of a graph.
        """
        if self._original is None:
            raise InputError("this graph has no original: it is one itself, or a part of a graph")
        return self._original

    def diff(self, original: TrainingGraph | None = None) -> GraphDiff:
        """What was added, replaced and removed, seen from the original step, or from another graph."""
        from e2pass.step.diff import diff

        return diff(self.original if original is None else original, self)

    def to_text(self) -> str:
        """A dump that is the same in every process: one line an operation, with everything known but its cost."""
        return self._writers.text(self)

    def to_networkx(self) -> nx.DiGraph:
        """A directed graph whose attributes are plain strings and numbers; energy and time are expected values."""
        return self._writers.networkx(self)

    def to_dot(self, path: File = None, *, collapse: bool = True, results: bool = False) -> str:
        """Graphviz source, one cluster a region.

        Args:
            path: File to write it to as well.
            collapse: Draw a run of equal blocks once, with the number of times it is repeated.
            results: Draw the picking of one result among several as a node of its own.
        """
        return _saved(self._writers.dot(self, collapse=collapse, results=results), path)

    def to_svg(self, path: File = None, *, collapse: bool = True, results: bool = False) -> str:
        """What Graphviz draws; the arguments are those of ``to_dot``.

        Raises:
            InputError: If Graphviz is not installed.
        """
        return _saved(self._writers.svg(self, collapse=collapse, results=results), path)

    def to_html(self, path: File = None) -> str:
        """A page that opens from disk without a network: the step to walk through, and what it costs."""
        return _saved(self._writers.html(self, None if self._report is None else self._report()), path)


def _saved(text: str, path: File) -> str:
    from e2pass.report.files import save

    return save(text, None if path is None else Path(path))


def _label(node: GraphNode, key: str) -> str:
    labels: dict[str, Any] = {"tag": node.tag, "path": node.site.layer}
    return str(labels[key] if key in labels else getattr(node.site, key) or "")


def _equal(have: str, wanted: str) -> bool:
    return have == wanted


def _below(have: str, wanted: str) -> bool:
    return have == wanted or have.startswith(f"{wanted}.")


_FILTERS = {"region": _equal, "block": _equal, "tag": _below, "path": _below, "phase": _equal, "technique": _equal}
