"""Look at what the transformation made: blocks, diagnostics, what changed, and the whole training step as one graph."""

from __future__ import annotations

from collections import Counter

import torch

import e2pass
from e2pass.models import resnet


def main() -> None:
    torch.manual_seed(0)
    t = e2pass.transform(resnet(8), torch.randn(8, 3, 16, 16))

    for block in t.blocks:
        print(f"{block.name}: {block.kind}, {len(block.nodes)} nodes, {'gated' if block.gated else block.reason}")
    print(*t.diagnostics.with_code("E2P100", "E2P210", "E2P300"), sep="\n")

    graph = t.graph
    print("operations by phase:", dict(Counter(str(node.site.phase) for node in graph.nodes)))
    print("inserted for PSG:", dict(Counter(node.tag for node in graph.tagged("psg"))))
    print("changes:", *(f"{count} {what} {change}" for change, what, count in graph.diff().summary()), sep="\n  ")

    # Which operations cost most, where in the model are they, and who made them?
    for row in sorted(graph.costs.values(), key=lambda row: -row.total_j)[:5]:
        node = graph[row.name]
        print(
            f"{row.name}: {row.op} in {row.layer or row.region}, {node.line or 'no line of the model'}, {node.made_by}"
        )

    graph.select(block="stage1.0").to_dot("block.dot")
    graph.to_dot("training_graph.dot")
    graph.to_html("training_graph.html")
    with open("training_graph.txt", "w", encoding="utf-8") as file:
        file.write(graph.to_text())


if __name__ == "__main__":
    main()
