"""Random networks whose blocks are known, by construction and by what closing a gate computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from e2pass.passes.residual import search
from tests.passes.residual.graphs import body, conv, exported, traced, without

CHANNELS = 4


class Unit(nn.Module):
    """A piece of a network; ``closed`` says which of its residual blocks hands on its skip path alone."""

    blocks: tuple[tuple[str, str, bool], ...] = ()
    """Path of each block's body within the unit, its kind, and whether it is to be gated."""

    def __init__(self) -> None:
        super().__init__()
        self.closed: str | None = None

    def join(self, name: str, skip: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Add a body's output to its skip path, unless the block is closed."""
        return skip if self.closed == name else skip + out


class Plain(Unit):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(conv(CHANNELS), nn.BatchNorm2d(CHANNELS), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.f(x)
        return out


class Identity(Unit):
    blocks = (("f", "identity", True),)

    def __init__(self) -> None:
        super().__init__()
        self.f = body(CHANNELS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.join("f", x, self.f(x)))


class PreActivation(Unit):
    blocks = (("f", "identity", True),)

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.f = nn.BatchNorm2d(CHANNELS), nn.Sequential(conv(CHANNELS), nn.ReLU(), conv(CHANNELS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.join("f", x, self.f(F.relu(self.norm(x))))


class Projection(Unit):
    blocks = (("f", "projection", True),)

    def __init__(self) -> None:
        super().__init__()
        self.f = body(CHANNELS)
        self.skip = nn.Sequential(conv(CHANNELS, kernel=1), nn.BatchNorm2d(CHANNELS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.join("f", self.skip(x), self.f(x)))


class SqueezeExcite(Unit):
    blocks = (("", "identity", True),)

    def __init__(self) -> None:
        super().__init__()
        self.f, self.down, self.up = body(CHANNELS), conv(CHANNELS, 2, 1), conv(2, CHANNELS, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.f(x)
        scale = torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(out, 1)))))
        return self.join("", x, out * scale)


class Parallel(Unit):
    blocks = (("", "identity", True),)

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = body(CHANNELS), body(CHANNELS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.join("", x, self.f(x) + self.g(x))


class Nested(Unit):
    blocks = (("", "identity", False), ("inner.f", "identity", True))

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Sequential(conv(CHANNELS), nn.ReLU()), Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.inner.closed = "f" if self.closed == "inner.f" else None
        return self.join("", x, self.inner(self.first(x)))


class Concatenation(Unit):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = body(CHANNELS), conv(2 * CHANNELS, CHANNELS, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.g(torch.cat((x, self.f(x)), 1)))


class Hourglass(Unit):
    """An encoder and decoder with an identity merge; there is a true block at its bottom."""

    blocks = (("bottom.f", "identity", True),)

    def __init__(self) -> None:
        super().__init__()
        self.down, self.bottom, self.up = conv(CHANNELS, stride=2), Identity(), conv(CHANNELS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.bottom.closed = "f" if self.closed == "bottom.f" else None
        return x + F.interpolate(F.relu(self.up(self.bottom(F.relu(self.down(x))))), scale_factor=2)


class LinearBranches(Unit):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Sequential(conv(CHANNELS), nn.BatchNorm2d(CHANNELS)), conv(CHANNELS, kernel=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.f(x) + self.g(x) + x)


class Biased(Unit):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.table = conv(CHANNELS), nn.Parameter(torch.randn(1, CHANNELS, 8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.f(x) + self.table)


UNITS: list[Callable[[], Unit]] = [
    Plain,
    Identity,
    PreActivation,
    Projection,
    SqueezeExcite,
    Parallel,
    Nested,
    Concatenation,
    Hourglass,
    LinearBranches,
    Biased,
]


@dataclass(frozen=True)
class _Expected:
    kind: str
    gated: bool


def _network(units: list[Callable[[], Unit]]) -> nn.Sequential:
    torch.manual_seed(len(units))
    model = nn.Sequential(conv(3, CHANNELS), *(unit() for unit in units), nn.Flatten(), nn.LazyLinear(5))
    model(torch.randn(2, 3, 8, 8))  # gives the last layer its size and the batch norms some statistics
    return model


def _truth(model: nn.Sequential) -> dict[str, _Expected]:
    return {
        f"{i}.{path}".rstrip("."): _Expected(kind, gated)
        for i, unit in enumerate(model)
        if isinstance(unit, Unit)
        for path, kind, gated in unit.blocks
    }


@settings(max_examples=25)
@given(st.lists(st.sampled_from(UNITS), min_size=1, max_size=6))
def test_all_blocks_and_no_others_are_found(units: list[Callable[[], Unit]]) -> None:
    model = _network(units)
    found = search(traced(model, torch.randn(2, 3, 8, 8)))
    assert {b.name: _Expected(b.kind, b.gated) for b in found.blocks} == _truth(model)


@settings(max_examples=15)
@given(st.lists(st.sampled_from(UNITS), min_size=1, max_size=4), st.data())
def test_without_its_body_a_block_is_its_skip_path(units: list[Callable[[], Unit]], data: st.DataObject) -> None:
    model = _network(units).eval()
    x = torch.randn(3, 3, 8, 8)
    graph_module = traced(model, x)
    blocks = search(graph_module).blocks
    if not blocks:
        return
    block = data.draw(st.sampled_from(blocks))
    position, _, path = block.name.partition(".")
    unit = model[int(position)]
    assert isinstance(unit, Unit)
    shortened = without(graph_module, block)
    unit.closed = path
    assert torch.equal(shortened(x), model(x))


@pytest.mark.parametrize("unit", UNITS)
def test_exported_graphs_have_the_same_blocks(unit: Callable[[], Unit]) -> None:
    model = _network([unit, unit])
    x = torch.randn(3, 3, 8, 8)
    expected = [(b.kind, b.gated) for b in search(traced(model, x)).blocks]
    graph_module = exported(model, x)
    found = search(graph_module).blocks
    assert [(b.kind, b.gated) for b in found] == expected
    for block in found:
        if block.gated:
            without(graph_module, block)(x)
