"""One graph of the whole training step: every operation with its region, phase, technique, cost and probability."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import networkx as nx
from torch import fx

from e2pass.cost import OpSite
from e2pass.dump import dump
from e2pass.lowering.partition import Halves
from e2pass.rates import PredictorHardware, Rates

STANDARD = PredictorHardware()


@dataclass(frozen=True)
class GraphNode:
    """One operation of the training step.

    Attributes:
        site: What a cost model sees; its probability is that of a step where everything runs.
        tag: What a rewrite inserted it for, e.g. ``psg.msb``; ``""`` for the model's own operations.
        gate: Index of the gate that decides about it, None if it always runs.
        full_dw: Weight whose full gradient it computes beside a predictor, ``""`` if none.
        operands: Names of the nodes it reads.
        half: The same operation on half the batch, which tells the price of a sample from that of entering the block;
            None where no gate decides about it, or the batch size is baked into the graph.
        coasts: Whether it happens in a dropped step too.
    """

    site: OpSite
    tag: str = ""
    gate: int | None = None
    full_dw: str = ""
    operands: tuple[str, ...] = ()
    half: OpSite | None = None
    coasts: bool = False

    @property
    def name(self) -> str:
        """Unique name, ``region/node``."""
        return self.site.name

    @property
    def per_sample(self) -> bool:
        """Whether it does more for more samples; False for what happens once for a batch that enters a block."""
        return self.half is None or (self.half.args, self.half.outputs) != (self.site.args, self.site.outputs)

    def executions(self, rates: Rates, hardware: PredictorHardware = STANDARD) -> tuple[float, float]:
        """Expected executions per nominal step: of what happens once for a batch, and of what each sample adds."""
        often = self.site.probability
        if self.full_dw:
            often *= hardware.full_share(rates.predicted(self.full_dw))
        kept, dropped = 1.0 - rates.drop, rates.drop if self.coasts else 0.0
        return (
            often * (kept * rates.entered(self.gate) + dropped),
            often * (kept * rates.executed(self.gate) + dropped),
        )

    def probability(self, rates: Rates, hardware: PredictorHardware = STANDARD) -> float:
        """Expected executions per nominal step."""
        once, each = self.executions(rates, hardware)
        return each if self.per_sample else once


class TrainingGraph:
    """The training step as one graph.

    Attributes:
        nodes: Every operation, in the order of the step.
        halves: Forward and backward graph of each lowered region.
        costs: Modelled cost of one execution of each priced node, by name.
        rates: The assumed rates.
    """

    def __init__(
        self, nodes: list[GraphNode], halves: Mapping[str, Halves], costs: Mapping[str, Any], rates: Rates
    ) -> None:
        self.nodes, self.halves, self.costs, self.rates = nodes, halves, costs, rates

    @property
    def forward(self) -> dict[str, fx.GraphModule]:
        """Forward graph of each region."""
        return {name: h.forward for name, h in self.halves.items()}

    @property
    def backward(self) -> dict[str, fx.GraphModule]:
        """Backward graph of each region."""
        return {name: h.backward for name, h in self.halves.items()}

    def tagged(self, prefix: str) -> Iterator[GraphNode]:
        """Nodes whose tag starts with ``prefix``, e.g. ``psg``."""
        return (n for n in self.nodes if n.tag.startswith(prefix))

    def to_text(self) -> str:
        """A stable dump: every region's two graphs, then the operations outside of regions."""
        parts = []
        for name, halves in self.halves.items():
            parts.append(f"region {name} forward\n{dump(halves.forward.graph)}")
            parts.append(f"region {name} backward\n{dump(halves.backward.graph)}")
        outside = [n for n in self.nodes if n.site.region not in self.halves]
        lines = [f"%{n.name}: {n.site.op} {n.site.phase} {n.tag}".rstrip() for n in outside]
        return "\n\n".join([*parts, "outside of regions\n" + "\n".join(lines)]) + "\n"

    def to_networkx(self) -> nx.DiGraph:
        """A directed graph with plain attributes: op, phase, technique, tag, layer, block, probability, energy_j."""
        graph = nx.DiGraph()
        for node in self.nodes:
            site, cost = node.site, self.costs.get(node.name)
            graph.add_node(
                node.name,
                op=site.op,
                region=site.region,
                layer=site.layer,
                block=site.block or "",
                phase=str(site.phase),
                technique=str(site.technique),
                tag=node.tag,
                probability=node.probability(self.rates),
                energy_j=0.0 if cost is None else cost.total_j,
                time_s=0.0 if cost is None else cost.time_s,
            )
        for node in self.nodes:
            graph.add_edges_from((operand, node.name) for operand in node.operands if operand in graph)
        return graph

    def to_dot(self) -> str:
        """Graphviz source, one cluster a region."""
        lines = ["digraph training_step {", "  rankdir=TB; node [shape=box, fontsize=9];"]
        regions: dict[str, list[GraphNode]] = {}
        for node in self.nodes:
            regions.setdefault(node.site.region, []).append(node)
        for i, (region, members) in enumerate(regions.items()):
            lines.append(f"  subgraph cluster_{i} {{ label={_quoted(region)};")
            for node in members:
                label = f"{node.name.rpartition('/')[2]}\\n{node.site.op}" + (f"\\n{node.tag}" if node.tag else "")
                style = ' style=filled fillcolor="#cfe8ff"' if node.tag else ""
                lines.append(f"    {_quoted(node.name)} [label={_quoted(label)}{style}];")
            lines.append("  }")
        known = {n.name for n in self.nodes}
        lines += [
            f"  {_quoted(operand)} -> {_quoted(n.name)};"
            for n in self.nodes
            for operand in n.operands
            if operand in known
        ]
        return "\n".join([*lines, "}"]) + "\n"


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '\\"') + '"'
