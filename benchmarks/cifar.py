"""Training ResNet-20 on CIFAR-10, for scripts that compare techniques: data, augmentation, schedule, resumable loop.

All runs share the order of images, the augmentation and the schedule; with the same seed also the initial weights. A
run's folder gets RUN.json, written after each epoch, and RUN.pt, from which a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import e2pass
from e2pass.demo.data import CIFAR_MEAN, CIFAR_STD, read_cifar10

BATCH = 128
LR, MOMENTUM, WEIGHT_DECAY = 0.2, 0.9, 5e-4


@dataclass(frozen=True)
class Data:
    """Images (N, 32, 32, 3) as bytes and labels (N,), in random order."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def head(self, limit: int | None) -> Data:
        """The first ``limit`` images for training, and all for the test."""
        return self if limit is None else Data(self.images[:limit], self.labels[:limit], *self.test())

    def test(self) -> tuple[Tensor, Tensor]:
        return self.test_images, self.test_labels


def load(path: Path | None, cache: Path) -> Data:
    """Decode the file once; shuffled, since it is sorted by class."""
    store = cache / "cifar10.pt"
    if not store.exists():
        if path is None:
            raise SystemExit(f"{store} is not there yet: give --data")
        pixels, labels, train = read_cifar10(path)
        order = np.random.default_rng(0).permutation(len(labels))
        chosen = [order[train[order]], order[~train[order]]]
        cache.mkdir(parents=True, exist_ok=True)
        save([torch.from_numpy(a[i]) for i in chosen for a in (pixels, labels)], store)
    return Data(*torch.load(store))


def save(value: Any, path: Path) -> None:
    """Write whole or not at all."""
    unfinished = path.with_suffix(".tmp")
    if path.suffix == ".json":
        unfinished.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    else:
        torch.save(value, unfinished)
    os.replace(unfinished, path)


def normalised(images: Tensor) -> Tensor:
    """Bytes (B, 32, 32, 3) as floats (B, 3, 32, 32)."""
    mean, std = torch.tensor(CIFAR_MEAN), torch.tensor(CIFAR_STD)
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by up to four pixels and flip half of them, the whole batch at once, still as bytes."""
    batch, size = len(images), images.shape[1]
    padded = functional.pad(images, (0, 0, 4, 4, 4, 4))
    top, left = torch.randint(0, 9, (2, batch, 1), generator=generator)
    rows, columns = top + torch.arange(size), left + torch.arange(size)
    flip = torch.rand(batch, 1, generator=generator) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    return padded[torch.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :]]


def batches(data: Data, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1000 + epoch)
    order = torch.randperm(len(data.images), generator=generator)
    for chosen in order.split(BATCH)[: len(order) // BATCH]:
        yield normalised(augmented(data.images[chosen], generator)), data.labels[chosen]


class Run:
    """One network in training: plain, or transformed with a configuration. Subclasses add what they record."""

    def __init__(self, config: e2pass.Config | None, seed: int) -> None:
        torch.manual_seed(seed)
        self.model: nn.Module = e2pass.models.resnet(20)
        self.transformed: e2pass.Transformed | None = None
        if config is not None:
            self.transformed = e2pass.transform(self.model, torch.randn(2, 3, 32, 32), config=config)
            self.model = self.transformed.model
        self.optimizer = torch.optim.SGD(self.groups(), lr=LR, momentum=MOMENTUM, nesterov=True)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups of the optimizer: weight decay for matrices and kernels only."""
        weights = [p for p in self.model.parameters() if p.dim() > 1]
        vectors = [p for p in self.model.parameters() if p.dim() <= 1]
        return [{"params": weights, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]

    def observed(self) -> dict[str, Any]:
        """What an epoch of training showed beside its loss."""
        return {}

    def test(self, data: Data, final: bool) -> dict[str, Any]:
        """Accuracy as the run is meant to be used, and at the end in other ways."""
        return {"accuracy": self.accuracy(data)}

    def schedule(self, progress: float) -> None:
        """One cycle: up to the peak in the first fifth, then down to nothing in a straight line."""
        factor = progress / 0.2 if progress < 0.2 else (1.0 - progress) / 0.8
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor

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
        result = {"epoch": epoch + 1, "loss": total / steps, "seconds": time.perf_counter() - started}
        return result | self.observed() | self.test(data, final=epoch + 1 == epochs)

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


def train(run: Run, name: str, data: Data, out: Path, epochs: int, now: int | None, seed: int) -> None:
    """Train from where the run was stopped, at most ``now`` epochs."""
    record_path, state_path = out / f"{name}.json", out / f"{name}.pt"
    record: dict[str, Any] = {"run": name, "epochs": epochs, "seed": seed, "images": len(data.images), "history": []}
    record |= {"torch": torch.__version__, "machine": f"{platform.machine()}, {torch.get_num_threads()} threads"}
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
        shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in result.items() if not isinstance(v, dict)}
        print(name, shown, flush=True)


def main(
    description: str | None,
    make: Callable[[str, int], Run],
    table: Callable[[Path], str],
    epochs: int,
    names: Collection[str] | None = None,
) -> None:
    """The command line of a script: ``make(name, seed)`` a run and train it, and print the ``table`` of a folder."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--data", type=Path, help="the .npz with the JPEG files")
    parser.add_argument("--cache", type=Path, help="folder of the decoded images; default --out")
    parser.add_argument("--run", choices=names, help="which run to train")
    parser.add_argument("--table", action="store_true", help="print the table of the results")
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--epochs-now", type=int, help="stop after so many epochs; the next call goes on")
    parser.add_argument("--limit", type=int, help="train on so many images only")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.run:
        options.out.mkdir(parents=True, exist_ok=True)
        data = load(options.data, options.cache or options.out).head(options.limit)
        run = make(options.run, options.seed)
        train(run, options.run, data, options.out, options.epochs, options.epochs_now, options.seed)
    if options.table:
        print(table(options.out))
