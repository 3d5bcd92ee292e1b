"""Training steps in onnxruntime beside PyTorch's: ResNet-20, MobileNetV2 and a small ViT, on scikit-learn's digits.

    python benchmarks/onnx_training.py [--only resnet20/e2train] [--out out/onnx_training.json]

For each model and preset: the same 20 batches from PyTorch's own state, one step each, and one epoch of both, free.
Finished cases are kept in the output file and not run again. With PSG the signs of the gradients are compared, and for
each other sign how near it is to a tie: the distance of the gradient from zero, or of the predicted gradient from its
threshold, as a share of the sum of magnitudes that the gradient adds up. With 8-bit codes a sum in another order moves
activations to the next code, so the share of equal signs stands beside that of PyTorch with and without oneDNN.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn import functional

import e2pass
from e2pass.backends.onnx_export import export_training, training_state
from e2pass.demo.data import load_digits
from e2pass.transformed import Transformed
from tests.backends.onnx_export_.ties import ties

BATCH = 32
STEPS = 20
LR = 0.02


def small_vit() -> nn.Module:
    import transformers

    config = transformers.ViTConfig(
        image_size=32, patch_size=4, hidden_size=96, num_hidden_layers=4, num_attention_heads=3, intermediate_size=192,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, id2label={i: str(i) for i in range(10)},
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet20": lambda: e2pass.models.resnet(20),
    "mobilenet_v2": e2pass.models.mobilenet_v2,
    "vit": small_vit,
}
CONFIGS: dict[str, e2pass.Config | str] = {
    "slu": "slu",
    "16 bits": e2pass.Config(smd=None, bits=e2pass.Bits(x=16, w=16)),
    "e2train": "e2train",
}


class Pair:
    """A transformed model, its exported step, and the data."""

    def __init__(self, model: str, preset: str, folder: Path) -> None:
        torch.manual_seed(0)
        images, labels = load_digits().train.tensors
        size = 16 if model == "resnet20" else 32
        self.x = functional.interpolate(images, (size, size)) if images.shape[-1] != size else images
        self.y = labels
        self.key = "pixel_values" if model == "vit" else "x"
        example = self.inputs(slice(0, BATCH))
        self.t = e2pass.transform(MODELS[model](), example, config=CONFIGS[preset])
        self.opt = torch.optim.SGD(self.t.param_groups(LR), lr=LR, momentum=0.9)
        start = time.perf_counter()
        path = export_training(
            self.t, example, self.y[:BATCH], folder / f"{model}_{preset}.onnx", optimizer=self.opt,
            gradients=True, loss=vit_loss if model == "vit" else None,
        )  # fmt: skip
        self.export_s = time.perf_counter() - start
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs_known = {i.name for i in self.session.get_inputs()} | {
            i.name for i in self.session.get_overridable_initializers()
        }
        self.outputs = [o.name for o in self.session.get_outputs()]
        self.loss = vit_loss if model == "vit" else functional.cross_entropy

    def inputs(self, where: Any) -> Any:
        return {self.key: self.x[where]} if self.key != "x" else self.x[where]

    def state(self) -> dict[str, np.ndarray[Any, Any]]:
        state = training_state(self.t, self.opt)
        return {k: v.numpy().copy() for k, v in state.items() if k in self.inputs_known}

    def torch_step(self, where: Any) -> float:
        self.opt.zero_grad()
        inputs = self.inputs(where)
        output = self.t.model(**inputs) if isinstance(inputs, dict) else self.t.model(inputs)
        loss = self.loss(output, self.y[where])
        loss.backward()
        self.opt.step()
        return float(loss.detach())

    def onnx_step(self, where: Any, state: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        feeds = {self.key: self.x[where].numpy(), "target": self.y[where].numpy(), **state}
        return dict(zip(self.outputs, self.session.run(None, feeds), strict=True))


def vit_loss(output: Any, target: Tensor) -> Tensor:
    return functional.cross_entropy(output.logits, target)


def stepwise(pair: Pair) -> dict[str, Any]:
    """Each step from PyTorch's own state: share of equal gradient signs, distance of the others from a tie."""
    generator = torch.Generator().manual_seed(1)
    equal, alike, total, parameters, losses, buffers = 0, 0, 0, 0.0, 0.0, 0.0
    share, nearness = 1.0, 0.0
    pair.t.model.train()
    for _ in range(STEPS):
        where = torch.randint(0, len(pair.y), (BATCH,), generator=generator)
        state = pair.state()
        found = pair.onnx_step(where, state)
        other = signs_without_onednn(pair, where)
        with ties(pair.t) as margins:
            loss = pair.torch_step(where)
        step_equal, step_total = 0, 0
        for name, p in pair.t.model.named_parameters():
            if p.grad is None:
                continue
            same = np.sign(found[f"grad.{name}"]) == np.sign(p.grad.numpy())
            step_equal, step_total = step_equal + int(same.sum()), step_total + same.size
            alike += int((other[name] == np.sign(p.grad.numpy())).sum())
            if name in margins and not same.all():
                nearness = max(nearness, float(margins[name].numpy()[~same].max()))
        for name, value in training_state(pair.t, pair.opt).items():
            if f"next.{name}" in found and value.is_floating_point():
                scale = max(float(value.abs().max()), 1e-3)
                difference = float(np.abs(found[f"next.{name}"] - value.numpy()).max()) / scale
                if name in dict(pair.t.model.named_parameters()):
                    parameters = max(parameters, difference)
                else:
                    buffers = max(buffers, difference)
        losses = max(losses, abs(float(found["loss"]) - loss))
        equal, total = equal + step_equal, total + step_total
        share = min(share, step_equal / step_total)
    return {
        "equal_signs": equal / total,
        "equal_signs_worst_step": share,
        "equal_signs_torch_without_onednn": alike / total,
        "signs": total,
        "tie_nearness": nearness,
        "parameter_difference": parameters,
        "other_state_difference": buffers,
        "loss_difference": losses,
    }


def signs_without_onednn(pair: Pair, where: Any) -> dict[str, np.ndarray[Any, Any]]:
    """PyTorch's own signs from the same state by other kernels: what a sum in another order changes."""
    twin = copy.deepcopy(pair.t.model)
    inputs = pair.inputs(where)
    torch._C._set_mkldnn_enabled(False)
    try:
        output = twin(**inputs) if isinstance(inputs, dict) else twin(inputs)
        pair.loss(output, pair.y[where]).backward()
    finally:
        torch._C._set_mkldnn_enabled(True)
    return {n: np.sign(p.grad.numpy()) for n, p in twin.named_parameters() if p.grad is not None}


def epoch(pair: Pair) -> dict[str, Any]:
    """One epoch of both, from the same state; the loss of each is the mean of the last ten batches."""
    start_state = pair.state()
    order = torch.randperm(len(pair.y), generator=torch.Generator().manual_seed(2))
    batches = [order[i : i + BATCH] for i in range(0, len(order) - BATCH + 1, BATCH)]
    clock = time.perf_counter()
    plain = [pair.torch_step(where) for where in batches]
    torch_s = time.perf_counter() - clock
    state, losses = start_state, []
    clock = time.perf_counter()
    for where in batches:
        found = pair.onnx_step(where, state)
        state = {name.removeprefix("next."): v for name, v in found.items() if name.startswith("next.")} | {
            k: v for k, v in state.items() if f"next.{k}" not in found
        }
        losses.append(float(found["loss"]))
    onnx_s = time.perf_counter() - clock
    first, end, other = np.mean(plain[:10]), np.mean(plain[-10:]), np.mean(losses[-10:])
    return {
        "batches": len(batches),
        "loss_first_ten": float(first),
        "loss_torch": float(end),
        "loss_onnxruntime": float(other),
        "loss_ratio": float(other / end),
        "torch_s_per_step": torch_s / len(batches),
        "onnxruntime_s_per_step": onnx_s / len(batches),
    }


def skipped(t: Transformed) -> float | None:
    return t.stats()["slu"]["skip_ratio"] if t.model.e2_slu is not None else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one case, MODEL/PRESET")
    parser.add_argument("--out", type=Path, default=Path("out/onnx_training.json"))
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    done: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    for model in MODELS:
        for preset in CONFIGS:
            case = f"{model}/{preset}"
            if case in done or options.only not in (None, case):
                continue
            pair = Pair(model, preset, options.out.parent)
            result = {"export_s": pair.export_s, **stepwise(pair)}
            result["skip_ratio"] = skipped(pair.t)
            done[case] = result | epoch(pair)
            options.out.write_text(json.dumps(done, indent=1) + "\n")
            print(case, json.dumps(done[case]), flush=True)


if __name__ == "__main__":
    main()
