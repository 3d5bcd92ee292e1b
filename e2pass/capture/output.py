"""Outputs of any structure as a flat list of tensors, and back."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

DYNAMIC = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
_PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)


@dataclass(frozen=True)
class _Slot:
    """The place of one tensor."""

    index: int


@dataclass(frozen=True)
class _Frozen:
    """An object of a class unknown to pytree, such as an attention cache, pickled with its tensors left out."""

    data: bytes


@dataclass(frozen=True)
class OutputForm:
    """The structure of an output without its tensors."""

    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]

    @property
    def constants(self) -> tuple[Any, ...]:
        """The leaves that are plain values; None in the places of tensors and unknown objects."""
        return tuple(None if isinstance(leaf, (_Slot, _Frozen)) else leaf for leaf in self.leaves)

    def rebuild(self, tensors: Sequence[Any]) -> Any:
        """Return the structure with ``tensors`` in their places."""
        leaves = [
            tensors[leaf.index]
            if isinstance(leaf, _Slot)
            else _Loader(leaf.data, tensors).load()
            if isinstance(leaf, _Frozen)
            else leaf
            for leaf in self.leaves
        ]
        return pytree.tree_unflatten(leaves, self.spec)


def flatten(output: Any) -> tuple[list[Any], OutputForm]:
    """Split an output into its tensors (and symbolic numbers) and its form.

    Raises:
        TypeError: If it holds an object that cannot be pickled.
    """
    values: list[Any] = []
    form: list[Any] = []
    leaves, spec = pytree.tree_flatten(output)
    for leaf in leaves:
        if isinstance(leaf, DYNAMIC):
            form.append(_Slot(len(values)))
            values.append(leaf)
        elif isinstance(leaf, _PLAIN):
            form.append(leaf)
        else:
            form.append(_Frozen(_freeze(leaf, values)))
    return values, OutputForm(spec, tuple(form))


def _freeze(value: Any, tensors: list[Any]) -> bytes:
    stream = io.BytesIO()
    try:
        _Saver(stream, tensors).dump(value)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(f"the model returns a {type(value).__name__}, which cannot be taken apart: {error}") from error
    return stream.getvalue()


class _Saver(pickle.Pickler):
    def __init__(self, stream: io.BytesIO, tensors: list[Any]) -> None:
        super().__init__(stream)
        self._tensors = tensors

    def persistent_id(self, obj: Any) -> int | None:
        """Take tensors out."""
        if not isinstance(obj, DYNAMIC):
            return None
        for index, known in enumerate(self._tensors):
            if known is obj:
                return index
        self._tensors.append(obj)
        return len(self._tensors) - 1


class _Loader(pickle.Unpickler):
    def __init__(self, data: bytes, tensors: Sequence[Any]) -> None:
        super().__init__(io.BytesIO(data))
        self._tensors = tensors

    def persistent_load(self, pid: int) -> Any:
        """Put tensors in."""
        return self._tensors[pid]
