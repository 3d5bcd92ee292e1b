from __future__ import annotations

import networkx as nx
from hypothesis import given
from hypothesis import strategies as st

from e2pass.passes.residual.dominators import ROOT, DominatorTree


@st.composite
def _dags(draw: st.DrawFn, smallest: int = 1) -> list[list[int]]:
    size = draw(st.integers(smallest, 40))
    return [sorted(draw(st.sets(st.integers(0, i - 1), max_size=3))) if i else [] for i in range(size)]


def _reference(predecessors: list[list[int]]) -> dict[int, int]:
    graph = nx.DiGraph([(ROOT, i) for i, before in enumerate(predecessors) if not before])
    graph.add_edges_from((p, i) for i, before in enumerate(predecessors) for p in before)
    return {n: d for n, d in nx.immediate_dominators(graph, ROOT).items() if n != ROOT}


@given(_dags())
def test_immediate_dominators_are_those_of_networkx(predecessors: list[list[int]]) -> None:
    tree = DominatorTree(predecessors)
    assert {i: tree.immediate(i) for i in range(len(predecessors))} == _reference(predecessors)


@given(_dags(smallest=2), st.data())
def test_common_dominator_is_the_immediate_dominator_of_a_join(
    predecessors: list[list[int]], data: st.DataObject
) -> None:
    joined = data.draw(st.lists(st.integers(0, len(predecessors) - 1), min_size=2, max_size=4, unique=True))
    tree = DominatorTree(predecessors)
    assert tree.common(joined) == _reference([*predecessors, joined])[len(predecessors)]


def test_long_skips_over_one_chain_take_few_steps() -> None:
    """The case that is quadratic when the tree is climbed one parent at a time."""
    size = 20_000
    chain: list[list[int]] = [[], *([i] for i in range(size - 1))]
    tree = DominatorTree([*chain, *([size - 1, i] for i in range(0, size, 10))])
    assert [tree.immediate(size + k) for k in range(size // 10)] == list(range(0, size, 10))
