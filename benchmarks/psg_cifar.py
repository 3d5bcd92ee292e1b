"""PSG on CIFAR-10 with ResNet-20 beside 8-bit training, sign SGD and plain SGD, all on one schedule.

    python -m benchmarks.psg_cifar --data cifar10_jpeg.npz --out runs/psg --run psg
    python -m benchmarks.psg_cifar --out runs/psg --table        # what is there, as the tables of docs/psg.md

A run is ``fp32``, ``8bit``, ``signsgd`` (the sign of the full 8-bit gradient) or ``psg``. ``--out`` gets RUN.json,
written after each epoch, and RUN.pt, from which a run that was stopped goes on. Data, augmentation and order of images
are those of ``slu_cifar.py``; seed, order and schedule are the same for all runs, and so is the learning rate, since
signs have the mean magnitude of the gradient.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import e2pass
from benchmarks.slu_cifar import BATCH, Data, batches, load, normalised, save

LR, MOMENTUM, WEIGHT_DECAY = 0.2, 0.9, 5e-4
CONFIGS: dict[str, e2pass.Config | None] = {
    "psg": e2pass.Config(smd=None, slu=None, psg=e2pass.PSG(stats=True, bound=True)),
    "8bit": e2pass.Config(smd=None, slu=None, psg=None),
    "fp32": None,
    "signsgd": e2pass.Config(smd=None, slu=None, psg=e2pass.PSG(x_bits=8, gy_bits=16, beta=0.0)),
}


class Run:
    """One network in training."""

    def __init__(self, name: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.model: nn.Module = e2pass.models.resnet(20)
        self.transformed: e2pass.Transformed | None = None
        config = CONFIGS[name]
        if config is not None:
            self.transformed = e2pass.transform(self.model, torch.randn(2, 3, 32, 32), config=config)
            self.model = self.transformed.model
        weights = [p for p in self.model.parameters() if p.dim() > 1]
        vectors = [p for p in self.model.parameters() if p.dim() <= 1]
        groups: list[dict[str, Any]] = [
            {"params": weights, "weight_decay": WEIGHT_DECAY},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM, nesterov=True)

    def schedule(self, progress: float) -> None:
        """One cycle: up to the peak in the first fifth, then down to nothing in a straight line."""
        for group in self.optimizer.param_groups:
            group["lr"] = LR * (progress / 0.2 if progress < 0.2 else (1.0 - progress) / 0.8)

    def epoch(self, data: Data, epoch: int, epochs: int) -> dict[str, Any]:
        """Train for one epoch and test."""
        self.model.train()
        if self.transformed is not None:
            self.transformed.reset_stats()
        started, steps, total = time.perf_counter(), len(data.images) // BATCH, 0.0
        for step, (x, y) in enumerate(batches(data, epoch)):
            self.schedule((epoch + (step + 1) / steps) / epochs)
            self.optimizer.zero_grad()
            loss = functional.cross_entropy(self.model(x), y)
            loss.backward()
            self.optimizer.step()
            total += loss.item()
        result: dict[str, Any] = {"epoch": epoch + 1, "loss": total / steps, "seconds": time.perf_counter() - started}
        stats = self.transformed.stats().get("psg") if self.transformed is not None else None
        if stats:
            result["layers"] = stats
        return result | {"accuracy": self.accuracy(data)}

    @torch.no_grad()
    def accuracy(self, data: Data) -> float:
        self.model.eval()
        images, labels = data.test()
        right = 0
        for x, y in zip(images.split(500), labels.split(500), strict=True):
            right += int((self.model(normalised(x)).argmax(1) == y).sum())
        return right / len(labels)

    def state(self) -> dict[str, Any]:
        model = self.model if self.transformed is None else self.transformed
        return {"model": model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        (self.model if self.transformed is None else self.transformed).load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def train(name: str, data: Data, out: Path, epochs: int, now: int | None, seed: int) -> None:
    """Train from where the run was stopped."""
    record_path, state_path = out / f"{name}.json", out / f"{name}.pt"
    run = Run(name, seed)
    record: dict[str, Any] = {"run": name, "epochs": epochs, "seed": seed, "images": len(data.images), "history": []}
    record["torch"] = torch.__version__
    if state_path.exists():
        held = torch.load(state_path, weights_only=False)
        if any(held["record"][key] != record[key] for key in ("epochs", "seed", "images")):
            raise SystemExit(f"{state_path} is of a run with other settings; choose another --out")
        record = held["record"]
        run.restore(held["state"])
    first = len(record["history"])
    for epoch in range(first, epochs if now is None else min(epochs, first + now)):
        result = run.epoch(data, epoch, epochs)
        record["history"].append(result)
        save({"record": record, "state": run.state()}, state_path)
        save(record, record_path)
        print(name, {k: v for k, v in result.items() if k != "layers"}, flush=True)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--data", type=Path, help="the .npz with the JPEG files")
    parser.add_argument("--cache", type=Path, help="folder of the decoded images; default --out")
    parser.add_argument("--run", choices=CONFIGS)
    parser.add_argument("--table", action="store_true", help="print the tables of the results")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--epochs-now", type=int, help="stop after so many epochs; the next call goes on")
    parser.add_argument("--limit", type=int, help="train on so many images only")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.run:
        options.out.mkdir(parents=True, exist_ok=True)
        data = load(options.data, options.cache or options.out).head(options.limit)
        train(options.run, data, options.out, options.epochs, options.epochs_now, options.seed)
    if options.table:
        print(table(options.out))


if __name__ == "__main__":
    main()
