"""Blocks that the user adds and removes by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from e2pass.errors import ConfigError
from e2pass.passes.residual import search
from tests.passes.residual.graphs import Fn, body, conv, mlp, traced

IMAGE = torch.randn(2, 4, 8, 8)


class Unit(nn.Module):
    """A unit with a body named ``body``."""

    def __init__(self) -> None:
        super().__init__()
        self.body = body(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.body(x))


class Stage(nn.Module):
    """Two units inside a longer skip."""

    def __init__(self) -> None:
        super().__init__()
        self.unit1, self.unit2 = Unit(), Unit()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.unit2(self.unit1(x))
        return out


@pytest.fixture
def stages() -> fx.GraphModule:
    return traced(nn.Sequential(Stage(), Stage()), IMAGE)


@pytest.fixture
def linear_body() -> fx.GraphModule:
    return traced(Fn(lambda m, x: F.relu(x + m.f(x)), f=nn.Sequential(conv(4), nn.BatchNorm2d(4))), IMAGE)


def _gated(graph_module: fx.GraphModule, **names: list[str]) -> set[str]:
    return {b.name for b in search(graph_module, **names).blocks if b.gated}


UNITS = {f"{s}.{u}.body" for s in "01" for u in ("unit1", "unit2")}


def test_exclude_one(stages: fx.GraphModule) -> None:
    assert _gated(stages, exclude=["1.unit2.body"]) == UNITS - {"1.unit2.body"}
    excluded = next(b for b in search(stages, exclude=["1.unit2.body"]).blocks if b.name == "1.unit2.body")
    assert excluded.reason == "excluded by the user"


def test_exclude_by_the_name_of_the_addition(stages: fx.GraphModule) -> None:
    first = next(b for b in search(stages).blocks if b.name == "0.unit1.body")
    assert _gated(stages, exclude=[first.join]) == UNITS - {"0.unit1.body"}


def test_exclude_all_in_a_module(stages: fx.GraphModule) -> None:
    assert _gated(stages, exclude=["0.unit1"]) == UNITS - {"0.unit1.body"}


def test_include_an_outer_block_instead_of_those_in_it(stages: fx.GraphModule) -> None:
    assert _gated(stages, include=["1"]) == {"0.unit1.body", "0.unit2.body", "1"}
    inner = next(b for b in search(stages, include=["1"]).blocks if b.name == "1.unit1.body")
    assert inner.reason == "it is part of 1, which is gated as a whole"


@pytest.mark.parametrize("name", ["add", "f.0"])
def test_include_what_was_rejected(linear_body: fx.GraphModule, name: str) -> None:
    assert search(linear_body).blocks == []
    found = search(linear_body, include=[name])
    (block,) = found.blocks
    assert block.gated
    assert found.rejected == []


def test_include_what_cannot_be_skipped() -> None:
    def returned(m: Any, x: torch.Tensor) -> Any:
        h = F.relu(m.f(x))
        return x + m.g(h), h

    graph_module = traced(Fn(returned, f=conv(4), g=conv(4)), IMAGE)
    with pytest.raises(ConfigError, match=r"include: 'add' cannot be skipped: .* another exit"):
        search(graph_module, include=["add"])


def test_include_rows_that_are_not_samples() -> None:
    graph_module = traced(Fn(lambda m, x: (lambda h: h + m.f(h))(x.reshape(-1, 8)), f=mlp(8)), torch.randn(2, 5, 8))
    with pytest.raises(ConfigError, match="'f' cannot be skipped: the rows"):
        search(graph_module, include=["f"])


def test_include_a_scaled_body() -> None:
    graph_module = traced(Fn(lambda m, x: torch.add(x, m.f(x), alpha=0.5), f=mlp(8)), torch.randn(2, 8))
    with pytest.raises(ConfigError, match=r"'f' cannot be skipped: .* alpha=0\.5"):
        search(graph_module, include=["f"])


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_unknown_name_lists_close_matches(stages: fx.GraphModule, option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option}: .*'0.unit3.body'; close matches are .*'0.unit1.body'"):
        search(stages, **{option: ["0.unit3.body"]})


def test_unknown_name_without_blocks() -> None:
    with pytest.raises(ConfigError, match="no residual block or addition named 'layer1'; the model has none"):
        search(traced(body(4), IMAGE), exclude=["layer1"])


def test_both_lists(stages: fx.GraphModule) -> None:
    with pytest.raises(ConfigError, match="both included and excluded"):
        search(stages, include=["1"], exclude=["1"])
