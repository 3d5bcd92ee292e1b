"""What learned gates skip in evaluation after a short run, before and after ``e2pass.update_bn``.

    python -m benchmarks.slu_short                  # prints the table of docs/slu.md
    python -m benchmarks.slu_short --targets 0.2 --seeds 4 --momentum 0.05

A ResNet with four gated blocks of 8 channels on scikit-learn's digits, 60 steps of 64 images, one cycle to a learning
rate of 0.1 (0.01 for the gates); once with the trained weights, once with their averages over the second half.
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel

import e2pass
from e2pass.demo.data import load_digits
from e2pass.runtime.module import E2Module
from tests.zoo import conv_residual, image_net

BATCH, LR, LAST = 64, 0.1, 10


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return image_net(*[part for _ in range(4) for part in (conv_residual(8), nn.ReLU())])


def train(
    seed: int, target: float, steps: int, momentum: float | None, images: Tensor, labels: Tensor
) -> tuple[E2Module, E2Module]:
    """A trained model, whose counts are those of the last steps, and its average."""
    config = e2pass.Config(smd=None, slu=e2pass.SLU(skip=target), psg=None, bits=None)
    t = e2pass.transform(network(seed), images[:BATCH], config=config)
    assert t.model.e2_slu is not None
    if momentum is not None:
        t.model.e2_slu.MOMENTUM = momentum
    optimizer = torch.optim.SGD(t.param_groups(lr=LR, gates_lr=LR / 10), momentum=0.9)
    peaks = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=peaks, total_steps=steps)
    dice = torch.Generator().manual_seed(seed)
    averaged: AveragedModel | None = None
    for step in range(steps):
        where = torch.randint(0, len(images), (BATCH,), generator=dice)
        if step == steps - LAST:
            t.reset_stats()
        optimizer.zero_grad()
        functional.cross_entropy(t.model(images[where]), labels[where]).backward()
        optimizer.step()
        schedule.step()
        if step >= steps // 2:
            averaged = averaged or AveragedModel(t.model)
            averaged.update_parameters(t.model)
    average = averaged.module if averaged is not None else None
    assert isinstance(average, E2Module)
    return t.model, average


def skipped(model: E2Module, images: Tensor) -> float:
    """Skip ratio in evaluation."""
    assert model.e2_slu is not None
    model.e2_slu.reset_statistics()
    model.eval()
    with torch.no_grad():
        for part in images.split(128):
            model(part)
    return float(model.e2_slu.skip_ratio(evaluation=True) or 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--targets", type=float, nargs="+", default=[0.2, 0.4, 0.7])
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--momentum", type=float, help="of the running statistics of logits, instead of the gates' own")
    options = parser.parse_args()
    torch.set_num_threads(1)
    digits = load_digits()
    (images, labels), (held_out, _) = digits.train.tensors, digits.test.tensors
    print("target, %  in training  trained  after update_bn  averaged  after update_bn   (a line a seed)", flush=True)
    for target in options.targets:
        for seed in range(options.seeds):
            trained, averaged = train(seed, target, options.steps, options.momentum, images, labels)
            assert trained.e2_slu is not None
            found = [float(trained.e2_slu.skip_ratio() or 0.0)]
            for model in (trained, averaged):
                found.append(skipped(copy.deepcopy(model), held_out))
                again = copy.deepcopy(model)
                e2pass.update_bn(images.split(BATCH), again)
                found.append(skipped(again, held_out))
            cells = zip(found, (12, 9, 17, 10, 17), strict=True)
            print(f"{100 * target:9.0f}", *(f"{100 * v:{w}.1f}" for v, w in cells), sep="", flush=True)


if __name__ == "__main__":
    main()
