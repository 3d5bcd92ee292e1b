"""The training graph for networkx."""

from __future__ import annotations

from typing import TYPE_CHECKING

from e2pass.step.graph import TrainingGraph
from e2pass.step.node import GraphNode

if TYPE_CHECKING:
    import networkx as nx


def to_networkx(graph: TrainingGraph) -> nx.DiGraph:
    """Return a directed graph whose attributes are plain strings and numbers, as JSON, GraphML and GEXF need them.

    Nodes carry ``op``, ``region``, ``layer`` (module path), ``line``, ``block``, ``phase``, ``technique``, ``tag``,
    ``made_by``, ``shape``, ``dtype`` and ``bits`` (comma-separated where there are several results), ``gate`` (-1 for
    none), ``probability``, and the expected ``energy_j``, ``time_s``, ``macs`` and ``dram_bytes`` of a nominal step
    with the ``formula``, or the reason why there is none. Edges carry their ``kind``.
    """
    import networkx as nx

    network = nx.DiGraph()
    for node in graph.nodes:
        network.add_node(node.name, **_attributes(graph, node))
    network.add_edges_from((edge.source, edge.target, {"kind": str(edge.kind)}) for edge in graph.edges)
    return network


def _attributes(graph: TrainingGraph, node: GraphNode) -> dict[str, str | int | float]:
    site, cost = node.site, graph.costs.get(node.name)
    why_not = graph.without_cost.get(node.name)
    return {
        "op": site.op,
        "region": site.region,
        "layer": site.layer,
        "line": node.line,
        "block": site.block or "",
        "phase": str(site.phase),
        "technique": str(site.technique),
        "tag": node.tag,
        "made_by": node.made_by,
        "shape": ", ".join("x".join(map(str, spec.shape)) for spec in node.outputs),
        "dtype": ", ".join(node.dtypes),
        "bits": ", ".join(str(spec.bits) for spec in node.outputs),
        "gate": -1 if node.gate is None else node.gate,
        "probability": node.probability(graph.rates),
        "energy_j": 0.0 if cost is None else cost.total_j,
        "time_s": 0.0 if cost is None else cost.time_s,
        "macs": 0.0 if cost is None else float(cost.macs),
        "dram_bytes": 0.0 if cost is None else cost.traffic_bytes.get(graph.price.dram, 0.0),
        "formula": cost.formula if cost is not None else why_not.reason if why_not is not None else "",
    }
