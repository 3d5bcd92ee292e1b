"""PSG on CIFAR-10 with ResNet-20 beside 8-bit training, sign SGD and plain SGD, all on one schedule.

    python -m benchmarks.psg_cifar --data cifar10_jpeg.npz --out runs/psg --run psg
    python -m benchmarks.psg_cifar --out runs/psg --table        # what is there, as the tables of docs/psg.md

A run is ``fp32``, ``8bit``, ``signsgd`` (the sign of the full 8-bit gradient), ``psg``, or ``psg`` with other high bits
(``floor`` and ``truncate``) or with powers of two as scales (``bit-true``). ``--out`` gets RUN.json, written after each
epoch, and RUN.pt, from which a run that was stopped goes on. Data, augmentation and order of images are those of
``cifar.py``; seed, order and schedule are the same for all runs, and so is the learning rate, since signs have the mean
magnitude of the gradient.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import e2pass
from benchmarks import cifar

CONFIGS: dict[str, e2pass.Config | None] = {
    "psg": e2pass.Config(smd=None, slu=None, psg=e2pass.PSG(stats=True, bound=True)),
    "8bit": e2pass.Config(smd=None, slu=None, psg=None),
    "fp32": None,
    "floor": e2pass.Config(smd=None, slu=None, psg=e2pass.PSG(stats=True, msb="floor")),
    "truncate": e2pass.Config(smd=None, slu=None, psg=e2pass.PSG(stats=True, msb="truncate")),
    "bit-true": e2pass.Config(smd=None, slu=None, psg=e2pass.PSG(stats=True), bits=e2pass.Bits(bit_true=True)),
    "signsgd": e2pass.Config(smd=None, slu=None, psg=e2pass.PSG(x_bits=8, gy_bits=16, beta=0.0)),
}


class Run(cifar.Run):
    """One of ``CONFIGS`` in training."""

    def __init__(self, name: str, seed: int) -> None:
        super().__init__(CONFIGS[name], seed)

    def observed(self) -> dict[str, Any]:
        layers = self.transformed.stats().get("psg") if self.transformed is not None else None
        return {"layers": layers} if layers else {}


def summary(history: list[dict[str, Any]]) -> dict[str, float]:
    """Predictor use and agreement over all epochs so far: elements of all layers together, and the worst layer."""
    used: dict[str, float] = {}
    agreed: dict[str, float] = {}
    elements = 0
    for epoch in history:
        for layer, row in epoch["layers"].items():
            predicted = row["use"] * row["elements"]
            used[layer] = used.get(layer, 0.0) + predicted
            agreed[layer] = agreed.get(layer, 0.0) + predicted * (row["agreement"] or 0.0)
            elements += row["elements"]
    layer_use = [row["use"] for epoch in history for row in epoch["layers"].values()]
    return {
        "use": sum(used.values()) / elements,
        "use, mean of layers": sum(layer_use) / len(layer_use),
        "agreement": sum(agreed.values()) / sum(used.values()),
        "worst layer's agreement": min(agreed[layer] / used[layer] for layer in used),
    }


def table(out: Path) -> str:
    """All runs as Markdown: accuracy after each epoch, then what the predictor did."""
    records = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(out.glob("*.json"))]
    epochs = max(record["epochs"] for record in records)
    lines = [f"| run | {' | '.join(map(str, range(1, epochs + 1)))} |", "|---" * (epochs + 1) + "|"]
    for record in records:
        cells = [f"{100 * h['accuracy']:.2f}" for h in record["history"]]
        lines.append(f"| {record['run']} | {' | '.join(cells + ['-'] * (epochs - len(cells)))} |")
    for record in records:
        history = record["history"]
        if "layers" not in history[0]:
            continue
        lines += ["", f"{record['run']}: " + ", ".join(f"{k} {100 * v:.1f} %" for k, v in summary(history).items())]
        lines += [
            "",
            "| layer | use, first epoch | last | agreement, first | last | bound, last |",
            "|---|---|---|---|---|---|",
        ]
        for layer, last in history[-1]["layers"].items():
            first = history[0]["layers"][layer]
            values = (first["use"], last["use"], first["agreement"], last["agreement"], last["bound"])
            cells = ["-" if v is None else f"{100 * v:.1f} %" for v in values]
            lines.append(f"| `{layer}` | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    cifar.main(__doc__, Run, table, epochs=10, names=CONFIGS)
