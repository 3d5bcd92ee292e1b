"""The small random transformers of ``transformer_models.json``: constructors and inputs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

ENTRIES = Path(__file__).resolve().with_suffix(".json")


def entries() -> Iterator[tuple[dict[str, Any], Callable[[], nn.Module]]]:
    """Each entry of the file, and its model's constructor."""
    for entry in json.loads(ENTRIES.read_text(encoding="utf-8")):
        config = getattr(transformers, entry["config"])(**entry["settings"])
        yield entry, partial(getattr(transformers, entry["model"]), config)


def inputs(entry: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Token ids, masks or features of the shapes that the entry names."""
    made: dict[str, torch.Tensor] = {}
    for name, shape in entry["inputs"].items():
        if name.endswith("input_ids"):
            made[name] = torch.randint(3, 40, shape)
        else:
            made[name] = torch.ones(shape, dtype=torch.long) if name.endswith("mask") else torch.randn(shape)
    return made
