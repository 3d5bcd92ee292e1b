"""The writers that ``TrainingGraph`` is given; each is imported when it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import networkx as nx

    from e2pass.report import CostReport
    from e2pass.step.graph import TrainingGraph


class GraphWriters:
    """Implements ``e2pass.step.graph.Writers``."""

    def text(self, graph: TrainingGraph) -> str:
        """Return a stable dump."""
        from e2pass.backends.graph.text import to_text

        return to_text(graph)

    def networkx(self, graph: TrainingGraph) -> nx.DiGraph:
        """Return a directed graph with plain attributes."""
        from e2pass.backends.graph.network import to_networkx

        return to_networkx(graph)

    def dot(self, graph: TrainingGraph, *, collapse: bool, results: bool) -> str:
        """Return Graphviz source."""
        from e2pass.backends.graph.dot import to_dot

        return to_dot(graph, collapse=collapse, results=results)

    def svg(self, graph: TrainingGraph, *, collapse: bool, results: bool) -> str:
        """Return what Graphviz draws of that."""
        from e2pass.backends.graph.dot import render, to_dot

        return render(to_dot(graph, collapse=collapse, results=results))

    def html(self, graph: TrainingGraph, report: CostReport | None) -> str:
        """Return a page that needs nothing else."""
        from e2pass.backends.graph.page import to_html

        return to_html(graph, report)
