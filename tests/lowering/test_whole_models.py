"""Every weight of whole models is rewritten whose gradient comes from a convolution or a matrix product."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from e2pass.api import pipeline
from e2pass.capture import capture
from e2pass.config import PRESETS
from e2pass.diagnostics import Diagnostics
from e2pass.inputs import Inputs
from e2pass.models import mobilenet_v2, resnet
from e2pass.passes.manager import PassManager
from e2pass.program import Program
from tests.zoo import ZOO

Make = Callable[[], tuple[nn.Module, Any]]


def images(build: Callable[[], nn.Module], size: int = 16) -> Make:
    return lambda: (build().train(), torch.randn(2, 3, size, size))


def resnext() -> nn.Module:
    """The model's own file: the package's list of models needs torchvision."""
    pytest.importorskip("pytorchcv")
    model: nn.Module = importlib.import_module("pytorchcv.models.resnext_cifar").resnext20_16x4d_cifar10()
    return model


EMBEDDED = "embedding"
ADDED = "not from a convolution or matrix product"  # a parameter that is added to an activation
MODELS: dict[str, tuple[Make, dict[str, str]]] = {
    "resnet-20": (images(lambda: resnet(20)), {}),
    "resnet-74": (images(lambda: resnet(74)), {}),
    "mobilenet-v2": (images(mobilenet_v2, 32), {}),
    "resnext": (images(resnext, 32), {}),
    "convnext": (ZOO["convnext"].make, {}),
    "vit": (
        ZOO["vit"].make,
        {"vit.embeddings.cls_token": ADDED, "vit.embeddings.position_embeddings": ADDED},
    ),
    "bert": (
        ZOO["bert"].make,
        {f"bert.embeddings.{k}_embeddings.weight": EMBEDDED for k in ("word", "position", "token_type")},
    ),
    "gpt2": (ZOO["gpt2"].make, {"transformer.wte.weight": EMBEDDED, "transformer.wpe.weight": EMBEDDED}),
}


def rewritten(model: nn.Module, example: Any) -> Program:
    inputs, config = Inputs.of(example), PRESETS["psg"]
    program = Program.of(model, inputs, config, capture(model, inputs, Diagnostics()))
    PassManager(pipeline(config)).run(program)
    return program


@pytest.mark.parametrize("name", MODELS)
def test_all_weights_of_products_are_predicted(name: str) -> None:
    make, exceptions = MODELS[name]
    model, example = make()
    program = rewritten(model, example)
    predicted = {d.node for d in program.diagnostics.with_code("E2P410")}
    weights = {n for n, p in model.named_parameters() if p.dim() >= 2 and p.requires_grad}
    assert weights - predicted == set(exceptions)
    reasons = {d.node: d.message for d in program.diagnostics.with_code("E2P411")}
    for weight, word in exceptions.items():
        assert word in reasons[weight], reasons[weight]
    for parameter in {n for n, p in model.named_parameters() if p.dim() < 2}:
        assert "one dimension" in reasons[parameter]
