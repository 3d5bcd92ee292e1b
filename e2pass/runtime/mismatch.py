"""Whether a state dict is one of a transformed model, and if not, in what words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

_ADDED = {"e2_slu": "gates", "e2_scales": "running scales of quantizers", "e2_steps": "the number of the step"}
"""What e2pass adds to a model, by the first part of its names."""


def mismatch(module: nn.Module, state: Mapping[str, Any]) -> str:
    """Which tensors a state dict lacks, has besides, or has in other shapes; empty if it fits.

    What e2pass adds depends on the configuration; if nothing else differs, the words say so.
    """
    own = module.state_dict()
    odd = [n for n in own.keys() & state.keys() if _shape(own[n]) != _shape(state[n])]
    lacks, besides = sorted(own.keys() - state.keys()), sorted(map(str, state.keys() - own.keys()))
    parts = {"it lacks": lacks, "it has besides": besides, "other shapes have": sorted(odd)}
    words = "; ".join(f"{what} {_some(names)}" for what, names in parts.items() if names)
    differing = [*lacks, *besides, *odd]
    if differing and all(name.partition(".")[0] in _ADDED for name in differing):
        return f"{words}; transform the model with the configuration that it was saved with"
    return words


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value)


def _some(names: Sequence[str]) -> str:
    """All that e2pass added in a word or two, then one of the others."""
    added = [f"{words} ({part})" for part, words in _ADDED.items() if any(_of(part, names))]
    others = [name for name in names if name.partition(".")[0] not in _ADDED]
    if others:
        added.append(others[0] if len(others) == 1 else f"{others[0]} and {len(others) - 1} more")
    return ", ".join(added)


def _of(part: str, names: Iterable[str]) -> Iterable[bool]:
    return (name.partition(".")[0] == part for name in names)
