"""A transformed model in PyTorch and its exported training step in onnxruntime, on scikit-learn's digits."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

BATCH = 32
LR = 0.02
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
PRESETS = ("slu", "e2train", "bit-true")
"""Presets."""


class Pair:
    """A transformed model, its exported step, and the data."""

    def __init__(self, model: str, preset: str, folder: Path) -> None:
        torch.manual_seed(0)
        digits = load_digits()
        self.x, self.y = digits.train.tensors
        self.test = digits.test.tensors
        self.key = "pixel_values" if model == "vit" else "x"
        example = self.inputs(self.x[:BATCH])
        self.t = e2pass.transform(MODELS[model](), example, config=preset)
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
        rates = {f"lr.{g['name'].replace(' ', '_')}": np.array(g["lr"], np.float32) for g in self.opt.param_groups}
        feeds = {self.key: self.x[where].numpy(), "target": self.y[where].numpy(), **rates, **state}
        return dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))

    def set_rate(self, lr: float) -> None:
        """Train with learning rate ``lr`` from here on, in both."""
        for group in self.opt.param_groups:
            group["lr"] = lr

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
    """PyTorch without oneDNN and NNPACK: what a sum in another order changes."""
    torch._C._set_mkldnn_enabled(False)
    torch._C._set_nnpack_enabled(False)
    try:
        yield
    finally:
        torch._C._set_nnpack_enabled(True)
        torch._C._set_mkldnn_enabled(True)
