"""Small models, each with one thing that makes capturing hard."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Modal(nn.Module):
    """Branches on ``self.training`` and calls dropout as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor, flag: bool = False, scale: Tensor | None = None) -> Any:
        h = functional.dropout(self.norm(self.conv(x)), 0.3, training=self.training)
        h = h * 2 if self.training else h
        h = h if scale is None else h * scale
        return self.head(h.mean((2, 3)) if not flag else h.amax((2, 3)))


class Nested(nn.Module):
    """Takes nested, keyword-only and variable keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, extra: Any = (), mode: str = "a", **kw: Any
    ) -> dict[str, Any]:
        h = self.linear(x) if mask is None else self.linear(x) * mask
        return {"h": h + kw["q"][0], "extras": [h - extra[1]["k"], None, mode]}


class Aliased(nn.Module):
    """Registers modules out of order, one under three names, and a parameter under two."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Linear(4, 4)
        self.first = nn.Linear(4, 4)
        self.alias = self.first
        self.items = nn.ModuleList([self.first, self.late])
        self.tied = self.late.weight
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Any:
        self.last_input = x
        return self.first(self.norm(self.alias(x))) + functional.linear(x, self.tied)


class NoGrad(nn.Module):
    """Has a region without gradients, assigned and incremented buffers, and constants."""

    steps: Tensor
    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4)
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("average", torch.ones(4))
        self.table = torch.arange(4.0)

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        with torch.no_grad():
            y = self.frozen(x) * 2
        if self.training:
            self.steps += 1
            self.average = self.average * 0.9 + y.mean(0) * 0.1
        return self.head(y + self.table) + x * torch.tensor([1.0, 2.0, 3.0, 4.0]), x.shape[0]


class DataDependent(nn.Module):
    """Branches on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        if x.sum() > 0:
            return self.linear(x)
        return self.linear(x) * 0.5


class Autocast(nn.Module):
    """Casts by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return self.linear(x)


class BatchBranch(nn.Module):
    """Treats small batches differently."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.linear(x) if x.shape[0] > 2 else self.linear(x) * 3


class Around(nn.Module):
    """Puts traceable layers around another module, which is called ``inner``."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.before = nn.Linear(4, 4)
        self.inner = inner
        self.after = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        return self.after(self.inner(self.before(x)).float())


class Straight(torch.autograd.Function):
    """Rounds; its gradient is the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient


class CustomGradient(nn.Module):
    """Equal outputs do not make an equal graph: tracing the rounding loses its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return Straight.apply(self.linear(x) * 5)  # type: ignore[no-untyped-call]


class Doubling(torch.autograd.Function):
    """Works in place; its gradient is not the one of what it does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Any:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient


class DirtyGradient(nn.Module):
    """A write that no graph would show."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return Doubling.apply(self.linear(x) * 5)  # type: ignore[no-untyped-call]


class FreshNoise(nn.Module):
    """Draws numbers of a fixed size: tracing by calling would freeze them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.linear(x) * torch.rand(4)
