"""The training graph for Graphviz."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

from e2pass.backends.graph.repeats import Run, find_runs, representatives
from e2pass.backends.graph.text import section_of
from e2pass.cost import Technique
from e2pass.dump import short_op
from e2pass.errors import InputError
from e2pass.step.edges import Edge, EdgeKind
from e2pass.step.graph import TrainingGraph
from e2pass.step.node import GraphNode

_FILL = {Technique.SMD: "#fbe3c0", Technique.SLU: "#ffe0b8", Technique.BITS: "#d8e8fb", Technique.PSG: "#d9f0dc"}
_STROKE = {
    EdgeKind.DATA: "#8a6d3b", EdgeKind.VALUE: "#33475b", EdgeKind.GATE: "#c2660a", EdgeKind.SAVED: "#a0aec0",
    EdgeKind.GRADIENT: "#9b2c2c", EdgeKind.UPDATE: "#2f6b3a",
}  # fmt: skip


def to_dot(graph: TrainingGraph, *, collapse: bool, results: bool) -> str:
    """Return Graphviz source; the arguments are those of ``TrainingGraph.to_dot``."""
    return "\n".join(_Drawing(graph, find_runs(graph) if collapse else [], results).lines()) + "\n"


def render(source: str) -> str:
    """Return the SVG that Graphviz makes of ``source``.

    Raises:
        InputError: If Graphviz is not installed, or cannot draw it.
    """
    program = shutil.which("dot")
    if program is None:
        raise InputError("Graphviz is not installed (no `dot` on the path); install it, or use to_dot or to_html")
    done = subprocess.run([program, "-Tsvg"], input=source, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise InputError(f"Graphviz cannot draw the graph: {done.stderr.strip()}")
    return done.stdout


class _Drawing:
    def __init__(self, graph: TrainingGraph, runs: list[Run], results: bool) -> None:
        self.graph, self.runs = graph, runs
        self.twin = representatives(graph, runs)
        self.hidden = {} if results else _pickings(graph)
        self.drawn = [n for n in graph.nodes if self.twin.get(n.name, n.name) == n.name and n.name not in self.hidden]

    def lines(self) -> Iterator[str]:
        yield "digraph training_step {"
        yield '  rankdir=TB; compound=true; fontname="Helvetica"; color="#cbd5e0";'
        yield '  node [shape=box style="rounded,filled" fillcolor=white color="#718096"];'
        yield '  node [fontname="Helvetica" fontsize=9];'
        yield '  edge [arrowsize=0.6 fontname="Helvetica" fontsize=9];'
        clusters: dict[tuple[str, bool], list[GraphNode]] = {}
        for node in self.drawn:
            clusters.setdefault((node.site.region, node.in_forward), []).append(node)
        for i, members in enumerate(clusters.values()):
            yield f"  subgraph cluster_{i} {{ label={quoted(self._title(members[0]))};"
            for node in members:
                yield f"    {quoted(node.name)} [label={_label(node)}{_style(node)}];"
            yield "  }"
        yield from self._edges()
        yield "}"

    def _title(self, node: GraphNode) -> str:
        count = next((run.count for run in self.runs if 0 <= node.stage - run.first < run.period), 1)
        return section_of(node).removeprefix("region ") + (f"  \N{MULTIPLICATION SIGN}{count}" if count > 1 else "")

    def _edges(self) -> Iterator[str]:
        seen: set[tuple[str, str]] = set()
        for edge in self.graph.edges:
            if edge.target in self.hidden:
                continue
            source = self._origin(edge.source)
            ends = self.twin.get(source, source), self.twin.get(edge.target, edge.target)
            if ends in seen:
                continue
            seen.add(ends)
            style = f"color={quoted(_STROKE[edge.kind])}"
            if self._returns(source, edge):
                style += ' style=dashed constraint=false tooltip="to the next repetition"'
            elif edge.kind is EdgeKind.SAVED:
                style += " style=dotted"
            yield f"  {quoted(ends[0])} -> {quoted(ends[1])} [{style}];"

    def _origin(self, name: str) -> str:
        while name in self.hidden:
            name = self.hidden[name]
        return name

    def _returns(self, source: str, edge: Edge) -> bool:
        """Whether an edge leads from one repetition to another."""
        first, second = self.graph[source].stage, self.graph[edge.target].stage
        for run in self.runs:
            ends = [(stage - run.first) // run.period for stage in (first, second)]
            if all(0 <= end < run.count for end in ends):
                return ends[0] != ends[1]
        return False


def _pickings(graph: TrainingGraph) -> dict[str, str]:
    """Nodes that only pick one of several results, with the node whose results they are."""
    return {n.name: n.operands[0] for n in graph.nodes if n.site.op == "_operator.getitem" and n.operands[0] in graph}


def _label(node: GraphNode) -> str:
    lines = [node.inner_name, short_op(node.site.op)]
    if node.tag:
        lines.append(node.tag)
    return quoted("\n".join(dict.fromkeys(lines)))


def _style(node: GraphNode) -> str:
    fill = _FILL.get(node.site.technique) or ("#fff6d6" if node.tag else "")
    return f" fillcolor={quoted(fill)}" if fill else ""


def quoted(text: str) -> str:
    """Return ``text`` as a DOT string; line breaks stay line breaks, backslashes are no escapes."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
