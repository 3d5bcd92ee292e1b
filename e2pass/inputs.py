"""Example inputs in one normal form: positional and keyword arguments, and any other batch size on demand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from e2pass.errors import InputError

_PLAIN = (bool, int, float, complex, str, torch.dtype, torch.device)


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call of a model.

    Attributes:
        args: Positional arguments; tensors may be nested in tuples, lists and dicts.
        kwargs: Keyword arguments.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that every leaf is something a call can be captured with."""
        for path, leaf in pytree.tree_flatten_with_path((self.args, self.kwargs))[0]:
            if not (leaf is None or isinstance(leaf, (torch.Tensor, *_PLAIN))):
                raise InputError(
                    f"example input {_where(path)} is a {type(leaf).__name__}; only tensors, numbers, strings and "
                    "None, nested in tuples, lists and dicts, are allowed"
                )
        tensors = self.tensors()
        if not tensors:
            raise InputError("the example inputs hold no tensor; at least one with a batch dimension is needed")
        if tensors[0].dim() == 0:
            raise InputError("the first tensor of the example inputs has no dimensions; dimension 0 must be the batch")
        if tensors[0].shape[0] == 0:
            raise InputError(f"the example batch is empty (shape {tuple(tensors[0].shape)}); give at least one sample")

    @classmethod
    def of(cls, example_inputs: Any) -> Inputs:
        """Normalize what users give as example inputs.

        Args:
            example_inputs: A tensor, a tuple or list of positional arguments, a dict of keyword arguments, or an
                ``Inputs``, which is returned as it is.

        Raises:
            InputError: For anything else, and where no tensor with a batch dimension is found.
        """
        if isinstance(example_inputs, Inputs):
            return example_inputs
        if isinstance(example_inputs, torch.Tensor):
            return cls((example_inputs,))
        if isinstance(example_inputs, Mapping):
            odd = [key for key in example_inputs if not isinstance(key, str)]
            if odd:
                raise InputError(f"the keyword arguments of the example inputs have a key {odd[0]!r} that is no string")
            return cls((), dict(example_inputs))
        if isinstance(example_inputs, (tuple, list)):
            return cls(tuple(example_inputs))
        raise InputError(
            f"example inputs of type {type(example_inputs).__name__} are not understood; give a tensor, a tuple of "
            "positional arguments or a dict of keyword arguments"
        )

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor of the call, in order."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, torch.Tensor)]

    @property
    def batch_size(self) -> int:
        """Size of dimension 0 of the first tensor."""
        return int(self.tensors()[0].shape[0])

    def is_batched(self, value: Any) -> bool:
        """Whether ``value`` is a tensor with the batch in dimension 0."""
        return isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[0] == self.batch_size

    def with_batch(self, n: int) -> Inputs:
        """Return a copy with ``n`` samples: the first ``n``, or all of them repeated in turn.

        Every tensor whose dimension 0 equals the batch size is cut or repeated; the others are copied as they are, so
        that a model that writes into its inputs does not reach the caller's tensors.

        Raises:
            InputError: If ``n`` is not positive.
        """
        if n < 1:
            raise InputError(f"a batch of {n} samples is not allowed; it must hold at least one")

        def resize(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            copy = value.detach()
            if self.is_batched(value) and n != self.batch_size:
                copy = copy[torch.arange(n, device=value.device) % self.batch_size]
            else:
                copy = copy.clone()
            return copy.requires_grad_(value.requires_grad)

        args, kwargs = pytree.tree_map(resize, (self.args, self.kwargs))
        return Inputs(args, kwargs)


def _where(path: tuple[Any, ...]) -> str:
    """Turn a pytree path of ``(args, kwargs)`` into words."""
    kind, *rest = path
    return ("positional" if kind.idx == 0 else "keyword") + " " + pytree.keystr(tuple(rest))
