"""SLU on CIFAR-10 with ResNet-20: learned gates beside stochastic depth and plain training.

    python benchmarks/slu_cifar.py --data cifar10_jpeg.npz --out runs/slu --run learned-40
    python benchmarks/slu_cifar.py --out runs/slu --table        # what is there, as the table of docs/slu.md

A run is ``plain``, ``learned-P`` or ``random-P`` (stochastic depth with constant survival), P the target skip ratio in
percent; ``--out`` gets RUN.json, written after each epoch, and RUN.pt, from which a run that was stopped goes on.
``--epochs-now`` bounds the epochs of one call. The decoded images are kept in ``--cache`` (180 MB), by default in
``--out``. All runs share seed, order of images, augmentation and schedule.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator
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
LR = 0.2
GATES_LR = 0.02
WEIGHT_DECAY = 5e-4
SAMPLED_EVALUATIONS = 3


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
    """One network in training, plain or transformed."""

    def __init__(self, name: str, seed: int) -> None:
        self.name = name
        self.kind, _, percent = name.partition("-")
        if self.kind not in ("plain", "learned", "random") or (self.kind == "plain") != (not percent):
            raise SystemExit(f"no run is called {name!r}: plain, learned-P or random-P with P in percent")
        torch.manual_seed(seed)
        model: nn.Module = e2pass.models.resnet(20)
        self.transformed: e2pass.Transformed | None = None
        if self.kind == "plain":
            own = list(model.parameters())
            groups: list[dict[str, Any]] = [
                {"params": [p for p in own if p.dim() > 1], "lr": LR, "weight_decay": WEIGHT_DECAY},
                {"params": [p for p in own if p.dim() <= 1], "lr": LR, "weight_decay": 0.0},
            ]
        else:
            slu = e2pass.SLU(skip=int(percent) / 100, gate=self.kind, seed=seed)
            config = e2pass.Config(smd=None, slu=slu, psg=None, bits=None)
            self.transformed = e2pass.transform(model, torch.randn(2, 3, 32, 32), config=config)
            model = self.transformed.model
            groups = self.transformed.param_groups(LR, WEIGHT_DECAY, gates_lr=GATES_LR)
        self.model = model
        self.optimizer = torch.optim.SGD(groups, lr=LR, momentum=0.9, nesterov=True)
        self.peaks = [group["lr"] for group in groups]

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
        result: dict[str, Any] = {"epoch": epoch + 1, "loss": total / steps, "seconds": time.perf_counter() - started}
        if self.transformed is not None:
            result["skip_train"] = self.transformed.stats()["slu"]["skip_ratio"]
        return result | self.test(data, final=epoch + 1 == epochs)

    def test(self, data: Data, final: bool) -> dict[str, Any]:
        """Accuracy as the run is meant to be used, and at the end in every other way."""
        t = self.transformed
        if t is None:
            return {"accuracy": self.accuracy(data)}
        if self.kind == "learned":
            result = self.gated(data)
        else:
            with t.set_gates("random", sampled=True):
                tests = [self.gated(data) for _ in range(SAMPLED_EVALUATIONS if final else 1)]
            result = tests[0] | {"accuracy": sum(r["accuracy"] for r in tests) / len(tests)}
        if final:
            if self.kind == "random":
                result["accuracy_expected"] = self.accuracy(data)
            with t.set_gates("open"):
                result["accuracy_open"] = self.accuracy(data)
        return result

    def gated(self, data: Data) -> dict[str, Any]:
        assert self.transformed is not None
        self.transformed.reset_stats()
        accuracy = self.accuracy(data)
        stats = self.transformed.stats()["slu"]
        blocks = {name: 1.0 - block["skip_ratio_eval"] for name, block in stats["blocks"].items()}
        return {"accuracy": accuracy, "skip_eval": stats["skip_ratio_eval"], "open_eval": blocks}

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
    record |= {"torch": torch.__version__, "machine": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    if state_path.exists():
        held = torch.load(state_path, weights_only=False)
        record = held["record"]
        if record["epochs"] != epochs or record["images"] != len(data.images) or record["seed"] != seed:
            raise SystemExit(f"{state_path} is of a run with other settings; choose another --out")
        run.restore(held["state"])
    first = len(record["history"])
    for epoch in range(first, epochs if now is None else min(epochs, first + now)):
        result = run.epoch(data, epoch, epochs)
        record["history"].append(result)
        save({"record": record, "state": run.state()}, state_path)
        save(record, record_path)
        shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in result.items() if k != "open_eval"}
        print(name, shown, flush=True)


def table(out: Path) -> str:
    """The finished runs as Markdown."""
    lines = [
        "| run | skipped in training, last epoch | skipped in test | test accuracy | all blocks run | "
        "open for 5-95 % of test images | training, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for path in sorted(out.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        history = record["history"]
        last = history[-1]
        unfinished = "" if len(history) == record["epochs"] else f" (epoch {len(history)} of {record['epochs']})"
        opened = list(last.get("open_eval", {}).values())
        varied = sum(0.05 < share < 0.95 for share in opened)
        everything = [last[k] for k in ("accuracy_open", "accuracy_expected") if k in last]
        lines.append(
            f"| {record['run']}{unfinished} | {_percent(last.get('skip_train'))} | {_percent(last.get('skip_eval'))} | "
            f"{_percent(last['accuracy'], 2)} | {', weighted: '.join(_percent(a, 2) for a in everything) or '-'} | "
            f"{f'{varied} of {len(opened)} blocks' if opened else '-'} | {sum(h['seconds'] for h in history):.0f} |"
        )
    return "\n".join(lines)


def _percent(share: float | None, digits: int = 1) -> str:
    return "-" if share is None else f"{share:.{digits}%}".replace("%", " %")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--data", type=Path, help="the .npz with the JPEG files")
    parser.add_argument("--cache", type=Path, help="folder of the decoded images; default --out")
    parser.add_argument("--run", help="plain, learned-P or random-P")
    parser.add_argument("--table", action="store_true", help="print the table of the results")
    parser.add_argument("--epochs", type=int, default=8)
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
