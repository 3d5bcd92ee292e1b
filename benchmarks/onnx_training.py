"""Training steps in onnxruntime beside PyTorch's: ResNet-20, MobileNetV2 and a small ViT, on scikit-learn's digits.

    python -m benchmarks.onnx_training [--only resnet20/e2train] [--part steps] [--out out/onnx_training.json]

For each model and preset: 20 batches, each step from PyTorch's own state; one epoch of both, free, from the initial
weights; and another from weights that PyTorch has trained for five epochs. Finished cases and parts of them are kept in
the output file and not run again.

Two correct runs differ by more than rounding where a value lies within rounding error of a kink. So these are measured:

- full precision: activations that only one of the two found positive (or below 6), and how far from the kink they lie;
  signs and parameters once more with PyTorch's activations on onnxruntime's sides; and, for each sign that still
  differs, the gradient in double precision beside PyTorch's own rounding error;
- whole steps: the share of equal signs, beside that between PyTorch with oneDNN and NNPACK and without them, and how
  near the unequal ones are to a tie; only ``bit-true`` makes these few in low precision;
- low precision: with PyTorch's codes given to both (``tests.backends.onnx_export_.identical``), every sign that is not
  the exact one and how near it is to a tie, and every quantizer that found another code and how near that is to one;
- an epoch: the loss at its end, in both from the same weights and from some that differ from them by rounding, so
  that what is drift and what would be a bias can be told apart; and PyTorch's without oneDNN.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.onnx_pair import BATCH, MODELS, PRESETS, Pair, other_kernels
from benchmarks.onnx_steps import steps
from e2pass.report import save

PARTS = ("steps", "epoch", "later epoch")
FIRST_LR = 0.005
"""Learning rate of the epoch from the initial weights; at 0.02 runs of PyTorch alone part by a tenth."""
WARM = 5
"""Epochs in PyTorch before the later one."""
WARM_LR = {"vit": 0.01}
"""Learning rates of these epochs, else 0.05; the later one has a tenth."""
LAST = 10
"""Batches whose mean loss is that of the end of an epoch."""


def epoch(pair: Pair, rounded: int) -> dict[str, Any]:
    """One epoch of both from the same state and from ``rounded`` others, and of PyTorch by other kernels."""
    batches = shuffled(pair, 2)
    ends: dict[str, list[dict[str, float]]] = {"torch": [], "torch_without_onednn": [], "onnxruntime": []}
    seconds = {"torch": 0.0, "onnxruntime": 0.0}
    for seed in range(1 + rounded):
        for runner, run in (("torch", torch_epoch), ("onnxruntime", onnx_epoch)):
            with pair.put_back():
                if seed > 0:
                    round_weights(pair, seed)
                started = time.process_time()
                losses = run(pair, batches)
                seconds[runner] += time.process_time() - started
                ends[runner].append(end(pair, losses))
    with pair.put_back(), other_kernels():
        ends["torch_without_onednn"].append(end(pair, torch_epoch(pair, batches)))
    training = {runner: [e["training"] for e in found] for runner, found in ends.items()}
    return {
        "batches": len(batches),
        "ends": ends,
        "mean_training_loss": {runner: float(np.mean(found)) for runner, found in training.items()},
        "ratio_of_means": float(np.mean(training["onnxruntime"]) / np.mean(training["torch"])),
        "cpu_s_per_step": {runner: s / len(batches) / (1 + rounded) for runner, s in seconds.items()},
    }


def first_epoch(pair: Pair, rounded: int) -> dict[str, Any]:
    """The same from the initial weights."""
    with pair.put_back():
        pair.set_rate(FIRST_LR)
        return epoch(pair, rounded)


def later_epoch(pair: Pair, rounded: int, lr: float) -> dict[str, Any]:
    """The same from weights that PyTorch has trained."""
    with pair.put_back():
        pair.set_rate(lr)
        losses = [loss for seed in range(WARM) for loss in torch_epoch(pair, shuffled(pair, 10 + seed))]
        pair.set_rate(lr / 10)
        return {"before": end(pair, losses), **epoch(pair, rounded)}


def shuffled(pair: Pair, seed: int) -> list[torch.Tensor]:
    """The batches of an epoch."""
    order = torch.randperm(len(pair.y), generator=torch.Generator().manual_seed(seed))
    return [order[i : i + BATCH] for i in range(0, len(order) - BATCH + 1, BATCH)]


def round_weights(pair: Pair, seed: int) -> None:
    """Move each weight by about its rounding error."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in pair.t.model.parameters():
            p.mul_(1 + 2.0**-23 * torch.randn(p.shape, generator=generator))


def torch_epoch(pair: Pair, batches: list[torch.Tensor]) -> list[float]:
    return [pair.torch_step(where) for where in batches]


def onnx_epoch(pair: Pair, batches: list[torch.Tensor]) -> list[float]:
    """The losses; the model has the parameters and buffers of the end."""
    state, losses = pair.state(), []
    for where in batches:
        found = pair.onnx_step(where, state)
        state = state | {k.removeprefix("next."): v for k, v in found.items() if k.startswith("next.")}
        losses.append(float(found["loss"]))
    tensors = {**dict(pair.t.model.named_parameters()), **dict(pair.t.model.named_buffers())}
    with torch.no_grad():
        for name, value in state.items():
            if name in tensors:
                tensors[name].copy_(torch.from_numpy(np.asarray(value)))
    return losses


def end(pair: Pair, losses: list[float]) -> dict[str, float]:
    """Mean loss of the last batches, and that of the test images in evaluation."""
    return {"training": float(np.mean(losses[-LAST:])), "test": pair.test_loss()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one case, MODEL/PRESET")
    parser.add_argument(
        "--part", choices=PARTS, help="only the 20 steps from PyTorch's state, or one of the free epochs"
    )
    parser.add_argument("--rounded", type=int, default=3, help="epochs of each from weights that differ by rounding")
    parser.add_argument("--out", type=Path, default=Path("out/onnx_training.json"))
    options = parser.parse_args()
    folder = options.out.parent / "onnx_training"
    folder.mkdir(parents=True, exist_ok=True)
    done: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    for model in MODELS:
        for preset in PRESETS:
            case = f"{model}/{preset}"
            parts = [part for part in PARTS if part not in done.get(case, {}) and options.part in (None, part)]
            if not parts or options.only not in (None, case):
                continue
            pair = Pair(model, preset, folder)
            for part in parts:
                if part == "steps":
                    result = steps(pair, folder / pair.path.stem)
                else:
                    lr = WARM_LR.get(model, 0.05)
                    rounded = options.rounded
                    first = part == "epoch"
                    result = first_epoch(pair, rounded) if first else later_epoch(pair, rounded, lr)
                done.setdefault(case, {})[part] = result
                save(json.dumps(done, indent=1) + "\n", options.out)
                print(case, part, json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
