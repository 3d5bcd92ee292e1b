"""What a call of a transformed model moves on the way, put back where the call does not come through."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from e2pass.runtime.gates import SLUGates

Slot = tuple[dict[str, Tensor | None], str]
"""The registry that holds a buffer, and its key there: buffers are replaced by ``to`` and by exports."""


def slots(module: nn.Module | None) -> list[Slot]:
    """Every buffer of a module and its children."""
    if module is None:
        return []
    return [(child._buffers, name) for child in module.modules() for name in child._buffers]


@contextmanager
def undone_on_failure(buffers: Sequence[Slot], slu: SLUGates | None) -> Iterator[None]:
    """Restore buffers and the gates' pass after an exception: a call with a wrong shape fails after layers that moved.

    Args:
        buffers: Running statistics, scales and counters that a call may change.
        slu: The gates, which keep their decisions until the pass is over.
    """
    kept = [(tensor, tensor.clone()) for registry, name in buffers if (tensor := registry[name]) is not None]
    scores = slu._scores if slu is not None else []
    try:
        yield
    except BaseException:
        for tensor, value in kept:
            tensor.data.copy_(value)  # as norms do it: the graph of an earlier call, yet to run backward, stays valid
        if slu is not None:
            slu._pass, slu._scores = None, scores
        raise
