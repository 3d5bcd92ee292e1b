"""Training steps in onnxruntime beside PyTorch's: ResNet-20, MobileNetV2 and a small ViT, on scikit-learn's digits.

    python -m benchmarks.onnx_training [--only resnet20/e2train] [--part steps] [--out out/onnx_training.json]

For each model and preset: 20 batches, each step from PyTorch's own state, and one epoch of both, free. Finished cases
and parts of them are kept in the output file and not run again.

Two correct runs differ by more than rounding where a value lies within rounding error of a kink. So these are measured:

- full precision: activations that only one of the two found positive (or below 6), and how far from the kink they lie;
  parameters are compared in the steps without such an activation, and apart in the others;
- low precision: with PyTorch's codes given to both (``tests.backends.onnx_export_.identical``), every sign that is not
  the exact one and how near it is to a tie, and every quantizer that found another code and how near that is to one;
- whole steps, free codes: the share of equal signs, beside that between PyTorch with oneDNN and without it;
- the epoch: the loss at its end, beside those of PyTorch without oneDNN, and from weights that differ by rounding.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

import e2pass
from e2pass.backends.onnx_export import export_training, training_state
from e2pass.demo.data import load_digits
from e2pass.transformed import Transformed
from tests.backends.onnx_export_.identical import Checker, recorded

BATCH = 32
STEPS = 20
GIVEN_CODES = (0, 10, 19)
"""Steps whose halves are compared with the codes given."""
ROUNDED = 3
"""Epochs of PyTorch from weights that differ by rounding."""
LR = 0.02
PARTS = ("steps", "epoch")
LAST = 10
"""Batches whose mean loss is that of the end of an epoch."""
Arrays = dict[str, np.ndarray[Any, Any]]


def small_vit() -> nn.Module:
    import transformers

    config = transformers.ViTConfig(
        image_size=16, patch_size=4, hidden_size=96, num_hidden_layers=4, num_attention_heads=3, intermediate_size=192,
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
        digits = load_digits()
        self.x, self.y = digits.train.tensors
        self.test = digits.test.tensors
        self.key = "pixel_values" if model == "vit" else "x"
        example = self.inputs(self.x[:BATCH])
        self.t = e2pass.transform(MODELS[model](), example, config=CONFIGS[preset])
        self.opt = torch.optim.SGD(self.t.param_groups(LR), lr=LR, momentum=0.9)
        self.loss = vit_loss if model == "vit" else functional.cross_entropy
        start = time.process_time()
        self.path = export_training(
            self.t, example, self.y[:BATCH], folder / f"{model}_{preset.replace(' ', '_')}.onnx", optimizer=self.opt,
            gradients=True, loss=self.loss,
        )  # fmt: skip
        self.export_s = time.process_time() - start
        self.session = session(self.path)
        self.known = {i.name for i in self.session.get_overridable_initializers()}

    def inputs(self, images: Tensor) -> Any:
        return {self.key: images} if self.key != "x" else images

    def run(self, model: nn.Module, images: Tensor) -> Any:
        inputs = self.inputs(images)
        return model(**inputs) if isinstance(inputs, dict) else model(inputs)

    def state(self) -> Arrays:
        return {k: v.numpy().copy() for k, v in training_state(self.t, self.opt).items() if k in self.known}

    def torch_step(self, where: Any) -> float:
        self.opt.zero_grad()
        loss = self.loss(self.run(self.t.model, self.x[where]), self.y[where])
        loss.backward()
        self.opt.step()
        return float(loss.detach())

    def onnx_step(self, where: Any, state: Arrays, session: onnxruntime.InferenceSession | None = None) -> Arrays:
        session = session or self.session
        feeds = {self.key: self.x[where].numpy(), "target": self.y[where].numpy(), **state}
        return dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))

    def test_loss(self) -> float:
        """Mean loss of the test images in evaluation mode."""
        self.t.model.eval()
        with torch.no_grad():
            loss = float(self.loss(self.run(self.t.model, self.test[0]), self.test[1]))
        self.t.model.train()
        return loss

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Whatever is trained within is forgotten afterwards."""
        model, opt = copy.deepcopy(self.t.model.state_dict()), copy.deepcopy(self.opt.state_dict())
        try:
            yield
        finally:
            self.t.model.load_state_dict(model)
            self.opt.load_state_dict(opt)


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def vit_loss(output: Any, target: Tensor) -> Tensor:
    return functional.cross_entropy(output.logits, target)


@contextmanager
def other_kernels() -> Iterator[None]:
    """PyTorch without oneDNN: what a sum in another order changes."""
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(True)


KINKS: dict[Any, tuple[float, ...]] = {functional.relu: (0.0,), torch.relu: (0.0,), functional.relu6: (0.0, 6.0)}


class Kinks(TorchFunctionMode):
    """Keeps what went into each ReLU or ReLU6, and what came out."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], tuple[float, ...]]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kinks = KINKS.get(function)
        before = args[0].detach().clone().numpy() if kinks else None
        result = function(*args, **(kwargs or {}))
        if kinks and before is not None:
            self.seen.append((before, result.detach().clone().numpy(), kinks))
        return result


class KinksInOnnx:
    """The exported step with its activations as further outputs."""

    def __init__(self, path: Path) -> None:
        model = onnx.load(path)
        taken = {o.name for o in model.graph.output}
        self.names = []
        for node in model.graph.node:
            if node.op_type in ("Relu", "Clip") or (node.op_type == "If" and node.name.endswith("_Body")):
                self.names += [name for name in node.output if name not in taken]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self.names)
        other = path.with_suffix(".kinks.onnx")
        onnx.save(model, other)
        self.session = session(other)
        other.unlink()

    def flipped(self, kinks: Kinks, found: Arrays) -> list[float]:
        """How far from its kink each activation lies that is on another side than in PyTorch, relative to the peak."""
        values = [found[name] for name in self.names]
        distances: list[float] = []
        for before, after, where in kinks.seen:
            pairs = [(v, mine) for v in values if v.shape == before.shape for mine in (before, after)]
            ours, theirs = min(pairs, key=lambda pair: float(np.abs(pair[0] - pair[1]).max()))
            peak = float(np.abs(ours).max())
            if float(np.abs(ours - theirs).max()) > 1e-3 * peak:
                raise RuntimeError(f"no output of the file is the activation of shape {before.shape}")
            for kink in where:
                other = (ours > kink) != (theirs > kink)
                distances += (np.maximum(np.abs(ours - kink), np.abs(theirs - kink))[other] / peak).tolist()
        return distances


ZERO_GRADIENT = "e2_slu.head.bias"
"""A standardised logit does not depend on it: its gradient is nothing but rounding error."""


def steps(pair: Pair, folder: Path) -> dict[str, Any]:
    """Each step from PyTorch's own state; the state stays where it was."""
    folder.mkdir(exist_ok=True)
    with pair.put_back():
        result = {"export_cpu_s": pair.export_s, **_steps(pair, folder)}
        return result | {"skip_ratio": skipped(pair.t)}


def _steps(pair: Pair, folder: Path) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    exact = pair.t.model._executable.cache is None
    kinked = KinksInOnnx(pair.path) if exact else None
    checker = Checker(folder)
    equal, own, total, share, losses = 0, 0, 0, 1.0, 0.0
    smooth: dict[str, float] = {}
    bent: dict[str, float] = {}
    distances: list[float] = []
    bent_steps = decided_apart = 0
    pair.t.model.train()
    for step in range(STEPS):
        where = torch.randint(0, len(pair.y), (BATCH,), generator=generator)
        found = pair.onnx_step(where, pair.state(), kinked.session if kinked else None)
        other = signs_by_other_kernels(pair, where)
        if exact:
            with Kinks() as kinks:
                loss = pair.torch_step(where)
        elif step in GIVEN_CODES:
            with recorded(pair.t) as records:
                loss = pair.torch_step(where)
            checker.add(records)
        else:
            loss = pair.torch_step(where)
        signs = {n: np.sign(p.grad.numpy()) for n, p in pair.t.model.named_parameters() if p.grad is not None}
        same = sum(int((np.sign(found[f"grad.{n}"]) == s).sum()) for n, s in signs.items())
        count = sum(s.size for s in signs.values())
        own += sum(int((other[n] == s).sum()) for n, s in signs.items())
        equal, total, share = equal + same, total + count, min(share, same / count)
        losses = max(losses, abs(float(found["loss"]) - loss) / loss)
        slu = pair.t.model.e2_slu
        if slu is not None:
            decided_apart += int(np.abs(found["next.e2_slu.opened"] - slu.opened.numpy()).sum())
        flips = kinked.flipped(kinks, found) if kinked else []
        distances, bent_steps = distances + flips, bent_steps + bool(flips)
        into = bent if flips else smooth
        for kind, difference in differences(pair, found).items():
            into[kind] = max(into.get(kind, 0.0), difference)
    result = {
        "signs": total,
        "equal_signs": equal / total,
        "equal_signs_worst_step": share,
        "equal_signs_torch_without_onednn": own / total,
        "loss_difference": losses,
        "gate_decisions_apart": decided_apart,
    }
    if not exact:
        return result | {"given_codes": dataclasses.asdict(checker.found), "differences": smooth}
    return result | {
        "steps_with_flipped_activations": bent_steps,
        "flipped_activations": len(distances),
        "flip_distance_of_peak": max(distances, default=0.0),
        "differences_without_flips": smooth,
        "differences_with_flips": bent,
    }


def differences(pair: Pair, found: Arrays) -> dict[str, float]:
    """The largest difference of parameters, of momenta, and of buffers, relative to each tensor's largest element."""
    parameters = dict(pair.t.model.named_parameters())
    worst: dict[str, float] = {}
    for name, value in training_state(pair.t, pair.opt).items():
        if f"next.{name}" not in found or not value.is_floating_point():
            continue
        kind = "parameters" if name in parameters else "momenta" if name.endswith("momentum_buffer") else "buffers"
        if name.removesuffix(".momentum_buffer") == ZERO_GRADIENT:
            kind = f"{kind} of {ZERO_GRADIENT}, absolute"
            scale = 1.0
        else:
            scale = max(float(value.abs().max()), 1e-3)
        difference = float(np.abs(found[f"next.{name}"] - value.numpy()).max()) / scale
        worst[kind] = max(worst.get(kind, 0.0), difference)
    return worst


def signs_by_other_kernels(pair: Pair, where: Any) -> Arrays:
    """PyTorch's own signs from the same state without oneDNN."""
    twin = copy.deepcopy(pair.t.model)
    with other_kernels():
        pair.loss(pair.run(twin, pair.x[where]), pair.y[where]).backward()
    return {n: np.sign(p.grad.numpy()) for n, p in twin.named_parameters() if p.grad is not None}


def epoch(pair: Pair) -> dict[str, Any]:
    """One epoch of both from the same state, and of PyTorch by other kernels and from rounded weights."""
    order = torch.randperm(len(pair.y), generator=torch.Generator().manual_seed(2))
    batches = [order[i : i + BATCH] for i in range(0, len(order) - BATCH + 1, BATCH)]
    ends: dict[str, list[float]] = {}
    with pair.put_back():
        start = pair.state()
        clock = time.process_time()
        plain = [pair.torch_step(where) for where in batches]
        torch_s = time.process_time() - clock
        ends["torch"] = [float(np.mean(plain[-LAST:])), pair.test_loss()]
    with pair.put_back(), other_kernels():
        losses = [pair.torch_step(where) for where in batches]
        ends["torch_without_onednn"] = [float(np.mean(losses[-LAST:])), pair.test_loss()]
    for seed in range(ROUNDED):
        with pair.put_back():
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for p in pair.t.model.parameters():
                    p.mul_(1 + 2.0**-23 * torch.randn(p.shape, generator=generator))
            losses = [pair.torch_step(where) for where in batches]
            ends[f"torch_from_rounded_weights_{seed}"] = [float(np.mean(losses[-LAST:])), pair.test_loss()]
    with pair.put_back():
        state, losses = start, []
        clock = time.process_time()
        for where in batches:
            found = pair.onnx_step(where, state)
            state = state | {k.removeprefix("next."): v for k, v in found.items() if k.startswith("next.")}
            losses.append(float(found["loss"]))
        onnx_s = time.process_time() - clock
        tensors = {**dict(pair.t.model.named_parameters()), **dict(pair.t.model.named_buffers())}
        with torch.no_grad():
            for name, value in state.items():
                if name in tensors:
                    tensors[name].copy_(torch.from_numpy(np.asarray(value)))
        ends["onnxruntime"] = [float(np.mean(losses[-LAST:])), pair.test_loss()]
    return {
        "batches": len(batches),
        "loss_first_ten": float(np.mean(plain[:LAST])),
        "ends": {name: {"training": a, "test": b} for name, (a, b) in ends.items()},
        "torch_cpu_s_per_step": torch_s / len(batches),
        "onnxruntime_cpu_s_per_step": onnx_s / len(batches),
    }


def skipped(t: Transformed) -> float | None:
    return t.stats()["slu"]["skip_ratio"] if t.model.e2_slu is not None else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="one case, MODEL/PRESET")
    parser.add_argument("--part", choices=PARTS, help="only the 20 steps from PyTorch's state, or only the free epoch")
    parser.add_argument("--out", type=Path, default=Path("out/onnx_training.json"))
    options = parser.parse_args()
    folder = options.out.parent / "onnx_training"
    folder.mkdir(parents=True, exist_ok=True)
    done: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    for model in MODELS:
        for preset in CONFIGS:
            case = f"{model}/{preset}"
            parts = [part for part in PARTS if part not in done.get(case, {}) and options.part in (None, part)]
            if not parts or options.only not in (None, case):
                continue
            pair = Pair(model, preset, folder)
            for part in parts:
                result = steps(pair, folder / pair.path.stem) if part == "steps" else epoch(pair)
                done.setdefault(case, {})[part] = result
                options.out.write_text(json.dumps(done, indent=1) + "\n")
                print(case, part, json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
