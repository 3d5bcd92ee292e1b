"""The training graph as compact JSON: what repeats, in a network of equal blocks nearly everything, is stored once."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from typing import Any

from e2pass.backends.graph.text import type_text
from e2pass.cost import Phase
from e2pass.dump import short_op
from e2pass.step.cost import CostRow, UnpricedOp
from e2pass.step.graph import TrainingGraph
from e2pass.step.node import GraphNode

PICKING = ("_operator.getitem", "aten.sym_size.int")
"""Operations that only pass on one of several results, or a size: the drawing leads edges through them."""


class _Table:
    """Values by number, each once."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._known: dict[Hashable, int] = {}

    def put(self, value: Hashable) -> int:
        number = self._known.setdefault(value, len(self.values))
        if number == len(self.values):
            self.values.append(value)
        return number


def page_data(graph: TrainingGraph) -> dict[str, Any]:
    """Return what the page's scripts need; they decode it in ``model.js``.

    ``nodes`` holds columns. ``group`` (where it hangs in the hierarchy), ``region``, ``name``, ``kind`` (operator,
    phase, technique, tag, pass, type), ``cost``, ``origin`` (module path, line, block) and ``change`` (since the
    original step; the table is empty where that is not known) are numbers of entries in the tables of these names;
    ``reads`` holds numbers of nodes, ``state`` numbers in ``names``. ``no_gradient`` lists the backward operations that
    no gradient reaches.
    """
    names, groups, regions, kinds, costs, origins, changes = (_Table() for _ in range(7))
    changed = _changed(graph)
    index = {node.name: i for i, node in enumerate(graph.nodes)}
    levels = list(dict.fromkeys(level for row in graph.price.rows for level in row.energy_j))
    places = _Places(graph)
    fields = ("group", "region", "name", "kind", "cost", "origin", "change", "reads", "state")
    columns: dict[str, list[Any]] = {field: [] for field in fields}
    for node in graph.nodes:
        site = node.site
        columns["group"].append(groups.put(places.of(node)))
        columns["region"].append(regions.put(site.region))
        columns["name"].append(names.put(node.inner_name))
        kind = (site.op, short_op(site.op), str(site.phase), str(site.technique), node.tag, node.made_by, _type(node))
        columns["kind"].append(kinds.put(kind))
        columns["cost"].append(costs.put(_cost(graph, node, levels)))
        columns["origin"].append(origins.put((site.layer, node.line, site.block or "")))
        columns["change"].append(changes.put(changed.get(node.name, "same")))
        columns["reads"].append([index[o] for o in node.operands if o in index])
        columns["state"].append([names.put(s) for s in node.state])
    info = graph.info
    return {
        "model": info.model,
        "batch": info.batch_size,
        "board": info.board,
        "dram": graph.price.dram,
        "levels": [[level, _sources(level, info.sources)] for level in levels],
        "picking": list(PICKING),
        "names": names.values,
        "groups": groups.values,
        "regions": regions.values,
        "kinds": kinds.values,
        "costs": costs.values,
        "origins": origins.values,
        "changes": changes.values if changed else [],
        "no_gradient": [i for i, node in enumerate(graph.nodes) if node.without_gradient],
        "nodes": columns,
    }


def to_json(data: Mapping[str, Any]) -> str:
    """Return ``data`` as JSON that can stand in a script element: no name in it can end the element."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _changed(graph: TrainingGraph) -> dict[str, str]:
    """What was added or replaced since the original step, by name."""
    if not graph.has_original:
        return {}
    changes = graph.diff()
    replaced = {item.after.name: f"replaced: {'; '.join(item.changes)}" for item in changes.replaced}
    return {node.name: "added" for node in changes.added} | replaced


class _Places:
    """Where a node hangs in the hierarchy of the user's modules; in brackets what is no module."""

    def __init__(self, graph: TrainingGraph) -> None:
        self.graph = graph
        self.gates = {n.site.region: n.site.layer for n in graph.nodes if n.tag == "slu.gate"}

    def of(self, node: GraphNode) -> tuple[str, ...]:
        region = node.site.region
        if node.site.phase is Phase.DATA:
            return ("(batch)",)
        if region == "loss":
            return ("(loss)",)
        if region in self.gates:
            return (*self._path(self.gates[region]), "(gate)")
        if node.name.startswith("update/gates."):
            return self._gate_update(node.name.removeprefix("update/gates."))
        path = node.site.layer
        if not path:
            readers = [self.graph[name].site.layer for name in self.graph.readers(node.name)]
            path = next(filter(None, readers), "")
        return self._path(path) or (f"({region})",)

    def _gate_update(self, parameter: str) -> tuple[str, ...]:
        parts = parameter.split(".")
        block = self.gates.get(f"gate_{parts[1]}") if parts[0] == "gates" else None
        return ("(gates' shared LSTM)",) if block is None else (*self._path(block), "(gate)")

    def _path(self, path: str) -> tuple[str, ...]:
        return tuple(path.split(".")) if path else ()


def _type(node: GraphNode) -> str:
    widths = {spec.bits for spec in node.outputs}
    stored = type_text(node)
    narrow = [w for w in widths if f"i{w}" not in stored and w < 16]
    return f"{stored}, {max(narrow)} bits" if narrow else stored


def _cost(graph: TrainingGraph, node: GraphNode, levels: list[str]) -> tuple[Any, ...]:
    """Status, executions, joules, seconds, MACs, off-chip bytes, joules of each level, formula or reason."""
    probability = _short(node.probability(graph.rates))
    row: CostRow | None = graph.costs.get(node.name)
    if row is None:
        why_not = graph.without_cost.get(node.name)
        status = "no formula" if isinstance(why_not, UnpricedOp) else "free"
        return (status, probability, 0, 0, 0, 0, (), "" if why_not is None else why_not.reason)
    return (
        "priced", probability, _short(row.total_j), _short(row.time_s), _short(row.macs),
        _short(row.traffic_bytes.get(graph.price.dram, 0.0)),
        tuple(_short(row.energy_j.get(level, 0.0)) for level in levels), row.formula,
    )  # fmt: skip


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _sources(level: str, sources: Mapping[str, str]) -> list[tuple[str, str]]:
    """The numbers of the board behind the joules of one level."""
    if level == "compute":
        return [(k, v) for k, v in sources.items() if k.startswith(("array.", "vector_unit.")) and "_pj" in k]
    if level == "static":
        return [(k, v) for k, v in sources.items() if k.startswith("power.")]
    return [(k, v) for k, v in sources.items() if f"[{level}]" in k and "_pj" in k]
