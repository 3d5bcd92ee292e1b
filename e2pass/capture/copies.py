"""Copying a model that keeps computed tensors, as the hook of the former ``torch.nn.utils.weight_norm`` does."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def copied(model: M, memo: dict[int, Any] | None = None) -> M:
    """A deep copy; attributes that autograd computed are copied as values: the next call computes them anew.

    Args:
        model: Any module.
        memo: As for ``copy.deepcopy``, with what is copied already.
    """
    memo = {} if memo is None else memo
    for module in model.modules():
        for value in module.__dict__.values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo.setdefault(id(value), value.detach().clone())
    return copy.deepcopy(model, memo)
