"""The demo's two runs: the same network and loop, once plainly and once transformed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from e2pass.api import transform
from e2pass.demo.data import Images
from e2pass.errors import InputError
from e2pass.models import resnet
from e2pass.transformed import Transformed

Tick = Callable[[], None]
"""Called after every nominal epoch."""


@dataclass(frozen=True)
class Recipe:
    """How both runs train.

    Attributes:
        epochs: Nominal epochs; SMD drops batches within them and adds none.
        depth: Of the CIFAR ResNet, 6n + 2.
        batch_size: Samples of a mini-batch.
        lr: Peak learning rate of the one-cycle schedule, which moves once a nominal epoch.
        gates_lr: Peak learning rate of the gates.
        weight_decay: Of weights with more than one dimension.
        config: Preset of the transformed run.
        board: Board that the price is modelled on.
    """

    epochs: int = 20
    depth: int = 14
    batch_size: int = 32
    lr: float = 0.1
    gates_lr: float = 0.005
    weight_decay: float = 5e-4
    config: str = "e2train"
    board: str = "zedboard"


@dataclass(frozen=True)
class PlainRun:
    """What the plain run measured."""

    accuracy: float
    batches: int
    seconds: float


@dataclass(frozen=True)
class TransformedRun:
    """What the transformed run measured, and the price modelled at the measured rates.

    Attributes:
        accuracy: Test accuracy of ``t.model.eval()``, gates deciding, from 0 to 1.
        accuracy_unwrapped: Test accuracy of ``t.unwrap()``, every block run.
        batches: Mini-batches run.
        batches_nominal: Mini-batches that plain training would have run.
        skip_ratio: Energy-weighted share of the gated blocks that was skipped in training.
        skip_ratio_eval: Likewise in the test.
        predicted: Share of weight gradients that were predicted, averaged over the weights.
        agreement: Share of predicted signs that are those of the full gradient, averaged likewise.
        seconds: Wall-clock of training, compilation included.
        step: Modelled joules and seconds of one nominal step, before and after.
        saving_energy: Modelled share of energy saved.
        saving_time: Modelled share of time saved.
    """

    accuracy: float
    accuracy_unwrapped: float
    batches: int
    batches_nominal: int
    skip_ratio: float
    skip_ratio_eval: float
    predicted: float
    agreement: float
    seconds: float
    step: dict[str, float]
    saving_energy: float
    saving_time: float

    @property
    def dropped(self) -> float:
        """Share of mini-batches dropped."""
        return 1.0 - self.batches / self.batches_nominal


@dataclass(frozen=True)
class SeedResult:
    """Both runs of one seed."""

    seed: int
    plain: PlainRun
    transformed: TransformedRun

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"dropped": self.transformed.dropped}


def train_plain(images: Images, recipe: Recipe, seed: int, tick: Tick) -> PlainRun:
    """Train the network as it is."""
    model, loader = _setting(images, recipe, seed)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    start = time.perf_counter()
    batches = _train(model, loader, groups, recipe, tick)
    seconds = time.perf_counter() - start
    return PlainRun(accuracy(model, images.test), batches, seconds)


def train_transformed(images: Images, recipe: Recipe, seed: int, tick: Tick) -> tuple[TransformedRun, Transformed]:
    """Train the transformed network in the very same loop."""
    model, loader = _setting(images, recipe, seed)
    start = time.perf_counter()
    example = images.train.tensors[0][: recipe.batch_size]
    t = transform(model, example, loader, config=recipe.config, board=recipe.board)
    groups = t.param_groups(recipe.lr, recipe.weight_decay)
    for group in groups:
        if group["name"] == "gates":
            group["lr"] = recipe.gates_lr
    _train(t.model, t.loader, groups, recipe, tick)
    seconds = time.perf_counter() - start
    gated, whole = accuracy(t.model, images.test), accuracy(t.unwrap(), images.test)
    return _measured(t, gated, whole, seconds), t


def _setting(images: Images, recipe: Recipe, seed: int) -> tuple[nn.Module, DataLoader[Any]]:
    """The same weights and the same order of samples for both runs of a seed."""
    if len(images.train) < recipe.batch_size:
        raise InputError(f"{len(images.train)} training images do not fill a mini-batch of {recipe.batch_size}")
    torch.manual_seed(seed)
    model = resnet(recipe.depth)
    generator = torch.Generator().manual_seed(seed)
    # The last, smaller batch would weigh its few samples more than the others'.
    return model, DataLoader(images.train, recipe.batch_size, shuffle=True, generator=generator, drop_last=True)


def _train(model: nn.Module, loader: Iterable[Any], groups: list[dict[str, Any]], recipe: Recipe, tick: Tick) -> int:
    opt = torch.optim.SGD(groups, lr=recipe.lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        opt,
        max_lr=[group["lr"] for group in opt.param_groups],
        total_steps=max(recipe.epochs, 2),
        pct_start=0.2,
        cycle_momentum=False,
    )
    batches = 0
    model.train()
    for _ in range(recipe.epochs):
        for x, y in loader:
            opt.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            opt.step()
            batches += 1
        schedule.step()
        tick()
    return batches


def accuracy(model: nn.Module, images: TensorDataset, batch_size: int = 256) -> float:
    """Share of images whose highest score is the label's, in evaluation mode."""
    model.eval()
    x, y = images.tensors
    with torch.no_grad():
        right = sum(
            int((model(x[i : i + batch_size]).argmax(1) == y[i : i + batch_size]).sum())
            for i in range(0, len(y), batch_size)
        )
    return right / len(y)


def _measured(t: Transformed, gated: float, whole: float, seconds: float) -> TransformedRun:
    stats, report = t.stats(), t.report(rates="measured")
    assert report.transformed is not None
    before, after = report.baseline.totals, report.transformed.totals
    psg = list(stats["psg"].values())
    agreement = [p["agreement"] for p in psg if p["agreement"] is not None]
    return TransformedRun(
        accuracy=gated,
        accuracy_unwrapped=whole,
        batches=stats["smd"]["nominal"] - stats["smd"]["dropped"],
        batches_nominal=stats["smd"]["nominal"],
        skip_ratio=stats["slu"]["skip_ratio"],
        skip_ratio_eval=stats["slu"]["skip_ratio_eval"],
        predicted=sum(p["use"] for p in psg) / len(psg),
        agreement=sum(agreement) / len(agreement) if agreement else 0.0,
        seconds=seconds,
        step={
            "baseline_energy_j": before.energy_j,
            "baseline_time_s": before.time_s,
            "transformed_energy_j": after.energy_j,
            "transformed_time_s": after.time_s,
        },
        saving_energy=report.saving.energy or 0.0,
        saving_time=report.saving.time or 0.0,
    )
