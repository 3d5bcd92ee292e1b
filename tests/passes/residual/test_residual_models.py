"""Counts on real models, against what the models' own classes say about themselves.

A few that differ in kind; ``benchmarks/block_table.py`` counts those of 134 models.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from e2pass.blocks import BlockSearch
from e2pass.capture import capture
from e2pass.diagnostics import Diagnostics
from e2pass.inputs import Inputs
from e2pass.passes.residual import search


def _search(model: nn.Module, inputs: Any) -> BlockSearch:
    return search(capture(model.train(), Inputs.of(inputs), Diagnostics()).train)


def _pytorchcv(file: str, constructor: str) -> nn.Module:
    """Import the model's own file: the package's list of models needs torchvision."""
    pytest.importorskip("pytorchcv")
    model: nn.Module = getattr(importlib.import_module(f"pytorchcv.models.{file}"), constructor)()
    return model


CNNS: list[tuple[str, str, str, str, int]] = [
    # file and constructor, class of the units, attribute that says whether a unit is residual ("!" negates), size
    ("resnet_cifar", "resnet20_cifar10", "ResUnit", "", 32),
    ("preresnet_cifar", "preresnet20_cifar10", "PreResUnit", "", 32),
    ("seresnet_cifar", "seresnet20_cifar10", "SEResUnit", "", 32),
    ("mobilenetv2", "mobilenetv2_wd4", "LinearBottleneck", "residual", 224),
    ("ghostnet", "ghostnet", "GhostUnit", "!resize_identity", 224),
    ("regnet", "regnetx002", "RegNetUnit", "", 64),
    ("nin_cifar", "nin_cifar10", "", "", 32),
    ("squeezenet", "squeezenet_v1_1", "", "", 224),
]


@pytest.mark.parametrize(("file", "constructor", "unit", "attribute", "size"), CNNS, ids=[c[1] for c in CNNS])
def test_count_of_convolutional_networks(file: str, constructor: str, unit: str, attribute: str, size: int) -> None:
    model = _pytorchcv(file, constructor)
    name = attribute.removeprefix("!")
    units = [path for path, module in model.named_modules() if type(module).__name__ == unit]
    if name:
        wanted = not attribute.startswith("!")
        units = [path for path in units if bool(getattr(model.get_submodule(path), name)) is wanted]
    gated = [b.name for b in _search(model, torch.randn(2, 3, size, size)).blocks if b.gated]
    assert len(gated) == len(units)
    assert all(any(f"{g}.".startswith(f"{path}.") for path in units) for g in gated)


def test_resnet_in_resnet_of_resnets_gates_the_inner_level() -> None:
    """Its three stages and their sequence have skips too, around the units that have their own."""
    model = _pytorchcv("ror_cifar", "ror3_56_cifar10")
    units = sum(type(m).__name__ == "RoRResUnit" for m in model.modules())
    blocks = _search(model, torch.randn(2, 3, 32, 32)).blocks
    assert sum(b.gated for b in blocks) == units
    assert sum(not b.gated and "contains" in b.reason for b in blocks) == 3 + 1


IDS = {"input_ids": torch.arange(16).reshape(2, 8)}
MASKED = {**IDS, "attention_mask": torch.ones(2, 8, dtype=torch.long)}

TRANSFORMERS: dict[str, tuple[Callable[[], nn.Module], dict[str, torch.Tensor], int]] = {
    # two blocks per layer, one where attention and MLP are added together
    "t5 encoder": (
        lambda: transformers.T5EncoderModel(
            transformers.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=50)
        ),
        MASKED,
        4,
    ),
    "gpt-j": (
        lambda: transformers.GPTJModel(
            transformers.GPTJConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, vocab_size=50, use_cache=False)
        ),
        IDS,
        2,
    ),
    "convnext v2": (
        lambda: transformers.ConvNextV2Model(
            transformers.ConvNextV2Config(hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1])
        ),
        {"pixel_values": torch.randn(2, 3, 32, 32)},
        4,
    ),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_count_of_transformers(name: str) -> None:
    make, inputs, expected = TRANSFORMERS[name]
    found = _search(make(), inputs)
    assert sum(b.gated for b in found.blocks) == len(found.blocks) == expected


def test_cache_that_is_returned_keeps_attention_from_being_skipped() -> None:
    """Keys and values leave the body; the reason says where to."""
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=8, use_cache=True)
    found = _search(transformers.GPT2Model(config), IDS)
    assert [b.name for b in found.blocks] == ["h.0.mlp", "h.1.mlp"]
    assert sum("output of the model (a cache" in r.reason for r in found.rejected) == 2
