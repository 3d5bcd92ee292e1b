"""Where kept batches come from: what the sources with and without indices have in common."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from e2pass.smd.progress import Progress
from e2pass.smd.randomness import RandomSources, owners


class Feed(ABC):
    """A source of batches with its random generators and everything in it that counts epochs.

    Attributes:
        source: What is iterated over: of a ``DataLoader`` a shallow copy, as the user's own must not change. The copy
            has every setting, those of subclasses too, whatever their constructors look like.
        sources: The random generators that its order may depend on.
    """

    def __init__(self, source: Any) -> None:
        holders = owners(source)
        self.sources = RandomSources(holders)
        self.source = copy.copy(source) if isinstance(source, DataLoader) else source
        candidates: list[Any] = [self.source, *holders[1:]]
        self._epoch_aware = [c for c in candidates if callable(getattr(c, "set_epoch", None))]
        self.restart()

    @abstractmethod
    def length(self) -> int | None:
        """Return the nominal number of batches of the next pass, or None if that is not known."""

    @abstractmethod
    def open(self, progress: Progress) -> Iterator[Any]:
        """Iterate over the kept batches from ``progress.position`` on, appending to ``progress.in_flight`` for each."""

    def set_epoch(self, epoch: int) -> None:
        """Tell the loader, samplers and datasets that have ``set_epoch``."""
        for target in self._epoch_aware:
            target.set_epoch(epoch)

    def sampler_epochs(self) -> list[int | None]:
        """Return the ``epoch`` of each of them, None where that is not an integer."""
        epochs = (getattr(target, "epoch", None) for target in self._epoch_aware)
        return [epoch if isinstance(epoch, int) else None for epoch in epochs]

    def restore_sampler_epochs(self, epochs: list[int | None]) -> None:
        """Set each of them back to what ``sampler_epochs`` returned."""
        for target, epoch in zip(self._epoch_aware, epochs, strict=True):
            if epoch is not None:
                target.set_epoch(epoch)

    def in_order(self) -> bool:
        """Return whether batches are yielded in the order in which they are sampled."""
        return not isinstance(self.source, DataLoader) or self.source.num_workers == 0 or self.source.in_order

    def workers_alive(self) -> bool:
        """Return whether persistent workers of an earlier pass wait for the next one."""
        return isinstance(self.source, DataLoader) and vars(self.source)["_iterator"] is not None

    def restart(self) -> None:
        """Let the next pass start workers of its own."""
        if isinstance(self.source, DataLoader):
            vars(self.source)["_iterator"] = None


def known_length(sized: Any) -> int | None:
    """Return ``len(sized)``, or None for things that have none."""
    try:
        return len(sized)
    except (TypeError, NotImplementedError):
        return None
