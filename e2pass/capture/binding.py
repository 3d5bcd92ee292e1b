"""From the arguments of a call to the flat placeholders of a captured graph."""

from __future__ import annotations

import inspect
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from e2pass.errors import InputError
from e2pass.inputs import Inputs


@dataclass(frozen=True)
class Call:
    """Arguments of one call; the values may be of any kind (tracers pass proxies)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Binding:
    """The signature that a capture was made for.

    A call is brought to a normal form first: arguments are named by the signature of ``forward``, and arguments that
    hold their default are dropped. What remains is flattened; its tensors are the placeholders, everything else is a
    constant that was baked into the graph.

    Attributes:
        names: One valid and unique identifier per placeholder.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        """Bind the example call.

        Raises:
            InputError: If the example does not fit the signature of ``model.forward``.
        """
        self._model_name = type(model).__name__
        self._signature = _signature(model)
        leaves, self._spec = pytree.tree_flatten_with_path(self._normal_form(inputs.args, inputs.kwargs))
        self._leaves = [None if isinstance(value, torch.Tensor) else value for _, value in leaves]
        self._positions = [i for i, (_, value) in enumerate(leaves) if isinstance(value, torch.Tensor)]
        self._tensors = [pytree.keystr(path) for path, value in leaves if isinstance(value, torch.Tensor)]
        self._constants = {pytree.keystr(path): v for path, v in leaves if not isinstance(v, torch.Tensor)}
        self._only_positional = not inputs.kwargs and len(self._tensors) == len(leaves) == len(inputs.args)
        values = [value for _, value in leaves if isinstance(value, torch.Tensor)]
        self._examples = [(tuple(value.shape), value.dtype, inputs.is_batched(value)) for value in values]
        first = inputs.tensors()[0]
        self._batch_at = next((i for i, value in enumerate(values) if value is first), 0)
        self._fixed: list[tuple[int | None, ...]] | None = None
        self._allows_batch: Callable[[int], bool] | None = None
        self._batch_checked: dict[int, bool] = {}
        self.names = _identifiers(self._tensors)

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
        """Return one tensor per placeholder.

        Raises:
            InputError: If the call has other arguments, other constants, or (where the graph has them baked in) other
                sizes than the call that was captured.
        """
        fast = self._only_positional and not kwargs and len(args) == len(self._tensors)
        if fast and all(isinstance(value, torch.Tensor) for value in args):
            values = tuple(args)
        else:
            values = self._by_path(args, kwargs)
        self._check_ranks(values)
        if self._fixed is not None:
            self._check_sizes(values, self._fixed)
        if self._allows_batch is not None:
            self._check_batch(int(values[self._batch_at].shape[0]), self._allows_batch)
        return values

    def call_with(self, tensors: Sequence[Any]) -> Call:
        """Return the example call with its tensors replaced by ``tensors``, which come in placeholder order."""
        leaves = list(self._leaves)
        for position, value in zip(self._positions, tensors, strict=True):
            leaves[position] = value
        arguments = OrderedDict(pytree.tree_unflatten(leaves, self._spec))
        bound = inspect.BoundArguments(self._signature, arguments)
        return Call(bound.args, bound.kwargs)

    def fix_sizes(self, sizes: Sequence[tuple[int | None, ...]]) -> None:
        """Refuse calls whose tensors differ from ``sizes``; None stands for any size."""
        self._fixed = list(sizes)

    def restrict_batch(self, allows: Callable[[int], bool]) -> None:
        """Refuse calls whose batch size, dimension 0 of the first tensor, ``allows`` is False for."""
        self._allows_batch = allows
        self._batch_checked = {}

    def _normal_form(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise InputError(
                f"the inputs do not fit {self._model_name}.forward{_parameters(self._signature)}: {error}"
            ) from None
        parameters = self._signature.parameters
        if any(parameters[name].kind is inspect.Parameter.VAR_POSITIONAL for name in bound.arguments):
            return dict(bound.arguments)  # dropping a default would shift what follows it
        return {name: v for name, v in bound.arguments.items() if not _is_default(v, parameters[name].default)}

    def _by_path(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
        given = {pytree.keystr(p): v for p, v in pytree.tree_flatten_with_path(self._normal_form(args, kwargs))[0]}
        values = []
        for path in self._tensors:
            value = given.pop(path, None)
            if not isinstance(value, torch.Tensor):
                raise InputError(
                    f"{self._model_name} was captured with a tensor for {path}; this call passes {_kind(value)}"
                )
            values.append(value)
        for path, constant in self._constants.items():
            value = given.pop(path, None)
            if type(value) is not type(constant) or value != constant:
                raise InputError(
                    f"{self._model_name} was captured with {path} = {constant!r}, which is part of the graph now; "
                    f"this call passes {_kind(value)}"
                )
        if given:
            raise InputError(
                f"{self._model_name} was captured without {', '.join(given)}; pass it in the example inputs too"
            )
        return tuple(values)

    def misfit(self, values: Sequence[torch.Tensor]) -> str:
        """Say in words in which input a call that failed differs from the example; ``""`` if in none.

        Other sizes are no error by themselves: a convolution takes any.
        """
        for name, value, (shape, dtype, batched) in zip(self.names, values, self._examples, strict=True):
            free = 1 if batched else 0
            if value.dtype != dtype or value.shape[free:] != shape[free:]:
                return (
                    f"input {name!r} of {self._model_name} is {value.dtype} of shape {tuple(value.shape)}; the graph "
                    f"was captured with {dtype} of shape {_free(shape, batched)}"
                )
        return ""

    def _check_ranks(self, values: Sequence[torch.Tensor]) -> None:
        for name, value, (shape, _, batched) in zip(self.names, values, self._examples, strict=True):
            if value.dim() != len(shape):
                raise InputError(
                    f"input {name!r} of {self._model_name} has shape {tuple(value.shape)}; the captured graph holds "
                    f"for {len(shape)} dimensions, such as {_free(shape, batched)}"
                )

    def _check_sizes(self, values: Sequence[torch.Tensor], fixed: Sequence[tuple[int | None, ...]]) -> None:
        for name, value, sizes in zip(self.names, values, fixed, strict=True):
            if value.dim() != len(sizes) or any(
                want not in (None, have) for want, have in zip(sizes, value.shape, strict=True)
            ):
                allowed = ", ".join("any" if size is None else str(size) for size in sizes)
                raise InputError(
                    f"input {name!r} of {self._model_name} has shape {tuple(value.shape)}; the captured graph holds "
                    f"for ({allowed})"
                )

    def _check_batch(self, batch: int, allows: Callable[[int], bool]) -> None:
        if batch not in self._batch_checked:
            self._batch_checked[batch] = allows(batch)
        if not self._batch_checked[batch]:
            raise InputError(
                f"the captured graph of {self._model_name} does not hold for a batch of {batch}, because the model "
                "treats other batch sizes differently; capture it with an example of this size"
            )


def _signature(model: nn.Module) -> inspect.Signature:
    try:
        return inspect.signature(model.forward)
    except (TypeError, ValueError):  # no Python signature: take arguments as they come
        kinds = inspect.Parameter
        return inspect.Signature([kinds("args", kinds.VAR_POSITIONAL), kinds("kwargs", kinds.VAR_KEYWORD)])


def _free(shape: tuple[int, ...], batched: bool) -> str:
    return "(" + ", ".join("batch" if batched and i == 0 else str(size) for i, size in enumerate(shape)) + ")"


def _parameters(signature: inspect.Signature) -> str:
    return "(" + ", ".join(signature.parameters) + ")"


def _kind(value: Any) -> str:
    return (
        repr(value) if isinstance(value, (type(None), bool, int, float, complex, str)) else f"a {type(value).__name__}"
    )


def _is_default(value: Any, default: Any) -> bool:
    if value is default:
        return True
    return type(value) is type(default) and isinstance(value, (bool, int, float, str)) and bool(value == default)


def _identifiers(paths: Sequence[str]) -> list[str]:
    """Turn ``['x'][0]`` into ``x_0``, unique within the list."""
    names: list[str] = []
    for path in paths:
        name = re.sub(r"\W+", "_", path).strip("_")
        name = name if name.isidentifier() else f"input_{name}"
        while name in names:
            name += "_"
        names.append(name)
    return names
