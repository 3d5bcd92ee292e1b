"""Outputs of any structure as a flat list of tensors, and back."""

from __future__ import annotations

import dataclasses
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
class _Fields:
    """An instance of a dataclass that pytree does not know, taken apart by its fields."""

    kind: type
    names: tuple[str, ...]
    form: OutputForm

    def rebuild(self, tensors: Sequence[Any]) -> Any:
        instance: Any = object.__new__(self.kind)  # what ``__init__`` computes is among the fields
        for name, value in zip(self.names, self.form.rebuild(tensors), strict=True):
            object.__setattr__(instance, name, value)
        return instance


@dataclass(frozen=True)
class OutputForm:
    """The structure of an output without its tensors."""

    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]

    @property
    def constants(self) -> tuple[Any, ...]:
        """The leaves that are plain values; None in the places of tensors and unknown objects."""

        def of(leaf: Any) -> Any:
            if isinstance(leaf, _Fields):
                return leaf.kind, leaf.names, leaf.form.spec, leaf.form.constants
            return None if isinstance(leaf, (_Slot, _Frozen)) else leaf

        return tuple(of(leaf) for leaf in self.leaves)

    def rebuild(self, tensors: Sequence[Any]) -> Any:
        """Return the structure with ``tensors`` in their places."""
        leaves = [
            tensors[leaf.index]
            if isinstance(leaf, _Slot)
            else _Loader(leaf.data, tensors).load()
            if isinstance(leaf, _Frozen)
            else leaf.rebuild(tensors)
            if isinstance(leaf, _Fields)
            else leaf
            for leaf in self.leaves
        ]
        return pytree.tree_unflatten(leaves, self.spec)


def flatten(output: Any, dynamic: tuple[type, ...] = DYNAMIC) -> tuple[list[Any], OutputForm]:
    """Split an output into its tensors (and symbolic numbers) and its form.

    Args:
        output: What a model returned.
        dynamic: Classes of what is taken out.

    Raises:
        TypeError: If it holds an object that cannot be pickled.
    """
    values: list[Any] = []
    return values, _form(output, values, dynamic)


def is_nested(output: Any, dynamic: tuple[type, ...] = DYNAMIC) -> bool:
    """Whether ``output`` is made of tuples, lists, dicts, numbers and what is ``dynamic`` alone."""
    if type(output) in (tuple, list):
        return all(is_nested(value, dynamic) for value in output)
    if type(output) is dict:
        return all(is_nested(value, dynamic) for value in output.values())
    return isinstance(output, (*dynamic, *_PLAIN))


def opened(output: Any) -> Any:
    """Return ``output`` with dicts of their fields in the places of dataclasses, so that pytree sees into them."""

    def open_leaf(leaf: Any) -> Any:
        return {name: opened(getattr(leaf, name)) for name in _fields(leaf)} if _is_instance(leaf) else leaf

    return pytree.tree_map(open_leaf, output)


def _form(output: Any, values: list[Any], dynamic: tuple[type, ...]) -> OutputForm:
    form: list[Any] = []
    leaves, spec = pytree.tree_flatten(output)
    for leaf in leaves:
        if isinstance(leaf, dynamic):
            form.append(_Slot(len(values)))
            values.append(leaf)
        elif isinstance(leaf, _PLAIN):
            form.append(leaf)
        elif _is_instance(leaf):
            names = _fields(leaf)
            form.append(_Fields(type(leaf), names, _form([getattr(leaf, n) for n in names], values, dynamic)))
        else:
            form.append(_Frozen(_freeze(leaf, values, dynamic)))
    return OutputForm(spec, tuple(form))


def _is_instance(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _fields(instance: Any) -> tuple[str, ...]:
    """The fields that have a value, and what else was set on an instance of a dataclass."""
    fields = [f.name for f in dataclasses.fields(instance) if hasattr(instance, f.name)]
    return tuple(dict.fromkeys([*fields, *getattr(instance, "__dict__", {})]))


def _freeze(value: Any, tensors: list[Any], dynamic: tuple[type, ...]) -> bytes:
    stream = io.BytesIO()
    try:
        _Saver(stream, tensors, dynamic).dump(value)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(f"the model returns a {type(value).__name__}, which cannot be taken apart: {error}") from error
    return stream.getvalue()


class _Saver(pickle.Pickler):
    def __init__(self, stream: io.BytesIO, tensors: list[Any], dynamic: tuple[type, ...]) -> None:
        super().__init__(stream)
        self._tensors = tensors
        self._dynamic = dynamic

    def persistent_id(self, obj: Any) -> int | None:
        """Take tensors out."""
        if not isinstance(obj, self._dynamic):
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
