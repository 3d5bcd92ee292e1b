"""Look at what the transformation made: blocks, diagnostics, and the whole training step as one graph."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

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

    # networkx: which operations cost most, once all probabilities are counted?
    network = graph.to_networkx()
    costly = sorted(network.nodes(data=True), key=lambda item: -item[1]["energy_j"] * item[1]["probability"])
    for name, node in costly[:5]:
        print(f"{name}: {node['op']} in {node['layer'] or node['region']}")

    Path("training_graph.txt").write_text(graph.to_text(), encoding="utf-8")
    Path("training_graph.dot").write_text(graph.to_dot(), encoding="utf-8")


if __name__ == "__main__":
    main()
