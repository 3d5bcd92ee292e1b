"""Shapes with symbolic sizes, compared by their expressions: comparing the sizes themselves would add guards."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

Size = Any  # an int, or the sympy expression of a symbolic size


def size_key(size: int | torch.SymInt) -> Size:
    """Return something hashable that is equal for sizes that are known to be equal."""
    if isinstance(size, torch.SymInt):
        expression = size.node.expr
        return int(expression) if expression.is_number else expression
    return int(size)


def hint(size: int | torch.SymInt) -> int | None:
    """Return the size in the example that was traced, None if unknown."""
    if isinstance(size, torch.SymInt):
        known = size.node.hint
        return None if known is None else int(known)
    return int(size)


def tensor_of(node: fx.Node) -> torch.Tensor | None:
    """Return the recorded value of a node if it is one tensor."""
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def tensors_of(node: fx.Node) -> list[torch.Tensor]:
    """Return all tensors in the recorded value of a node."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return [value]
    if value is None or isinstance(value, (int, float, str, torch.SymInt, torch.Size)):
        return []
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _same_size(one: int | torch.SymInt, other: int | torch.SymInt) -> bool:
    first, second = size_key(one), size_key(other)
    if isinstance(first, int) or isinstance(second, int):
        return bool(first == second)
    # floor divisions that only the run could simplify: the example decides
    return bool(first == second) or (hint(one) is not None and hint(one) == hint(other))


def same_shape(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two values have the same shape for every batch size."""
    return len(one.shape) == len(other.shape) and all(map(_same_size, one.shape, other.shape))


def same_rows(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two values have the same rank and the same first dimension."""
    return len(one.shape) == len(other.shape) > 0 and _same_size(one.shape[0], other.shape[0])


def batch_size(placeholders: Iterable[fx.Node]) -> Size | None:
    """Return the size that counts samples: the first symbolic leading size, else the first leading size."""
    leading = [value.shape[0] for node in placeholders for value in tensors_of(node) if len(value.shape) > 0]
    symbolic = [size for size in leading if isinstance(size, torch.SymInt) and not isinstance(size_key(size), int)]
    chosen = (symbolic or leading)[:1]
    return size_key(chosen[0]) if chosen else None


def rows_are_samples(value: torch.Tensor, batch: Size | None) -> bool:
    """Whether the first dimension of a value is the batch."""
    return len(value.shape) > 0 and bool(size_key(value.shape[0]) == batch)


def elements_per_row(value: torch.Tensor) -> int:
    """Return the number of elements of one row, with unknown sizes counted as 1."""
    count = 1
    for size in value.shape[1:]:
        count *= hint(size) or 1
    return count


def text(value: torch.Tensor, batch: Size | None) -> str:
    """Return a shape for a message: ``(4*batch, 16, 32, 32)``."""
    sizes = [str(size_key(size)) for size in value.shape]
    if not isinstance(batch, int):
        sizes = [re.sub(rf"\b{batch}\b", "batch", size) for size in sizes]
    return "(" + ", ".join(sizes) + ")"
