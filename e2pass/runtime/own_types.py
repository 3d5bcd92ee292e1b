"""State in a type of its own, whatever the model around it computes in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class OwnTypes(nn.Module):
    """A module that moves between devices with the model around it, and keeps its types.

    In half precision a moving average loses what a step adds to it, and a counter stops at 2048.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def kept(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(kept, recurse)  # type: ignore[no-untyped-call]
