"""Batches of map-style data: dropped in the sampler, so that nothing of them is ever fetched."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader

from e2pass.errors import LoaderError
from e2pass.smd.feed import Feed, known_length
from e2pass.smd.progress import Progress
from e2pass.smd.randomness import RandomSources, spare_generator
from e2pass.smd.schedule import Decision, DropSchedule


class DroppingSampler:
    """Stands before a batch sampler (or, without automatic batching, a sampler) and lets only the kept batches through.

    Sampling happens in the main process for any number of workers, so the decisions are taken in nominal order.
    Everything else that is asked of a sampler is answered by the one behind.
    """

    def __init__(self, inner: Any, schedule: DropSchedule, sources: RandomSources) -> None:
        self.inner = inner
        self.progress: Progress | None = None
        self._schedule = schedule
        self._sources = sources

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "inner":  # absent while a copy is being made
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __len__(self) -> int:
        length = len(self.inner)
        return length if self.progress is None else self._schedule.count(self.progress.epoch, length)

    def __iter__(self) -> Iterator[Any]:
        if self.progress is None:
            raise LoaderError("this sampler belongs to a loader with dropped batches; iterate over that loader")
        return self._kept(self.progress)

    def _kept(self, progress: Progress) -> Iterator[Any]:
        decisions = self._schedule.epoch(progress.epoch, progress.length)
        while decisions.step < progress.position:
            decisions.draw()
        held: list[Any] = []
        for indices in self._nominal(progress):
            match decisions.draw():
                case Decision.KEEP:
                    progress.in_flight.append(decisions.step)
                    yield indices
                case Decision.HOLD:
                    held = [indices]
                case Decision.DROP:
                    pass
        if held and not decisions.any_kept:
            progress.in_flight.append(progress.pulled)
            yield held[0]

    def _nominal(self, progress: Progress) -> Iterator[Any]:
        """Yield the nominal index batches after ``progress.position``."""
        if progress.before_first is None:
            progress.before_first = self._sources.state()
            source = iter(self.inner)
        else:
            source, ahead = self._replay(progress)
            yield from ahead
        for indices in source:
            progress.pulled += 1
            yield indices
        progress.exhausted = True

    def _replay(self, progress: Progress) -> tuple[Iterator[Any], list[Any]]:
        """Sample again what the saved run had sampled; return the sampler's iterator and what was not yet yielded."""
        with self._sources.replaying(progress.before_first):
            source = iter(self.inner)
            passed = sum(1 for _ in islice(source, progress.position))
            ahead = list(islice(source, progress.pulled - progress.position))
            if progress.exhausted:
                next(source, None)  # some samplers draw a last random number before they end
        if passed + len(ahead) < progress.pulled:
            raise LoaderError(
                f"the saved run had drawn {progress.pulled} batches of epoch {progress.epoch}, but the sampler now has "
                f"only {passed + len(ahead)}; resume with the same dataset and batch size"
            )
        return source, ahead


class SampledFeed(Feed):
    """The kept batches of a ``DataLoader`` over a map-style dataset."""

    def __init__(self, loader: DataLoader[Any], schedule: DropSchedule) -> None:
        super().__init__(loader)
        index_sampler = "sampler" if loader.batch_sampler is None else "batch_sampler"
        self._sampler = DroppingSampler(vars(loader)[index_sampler], schedule, self.sources)
        # Written to the dictionary because DataLoader forbids to replace a sampler.
        vars(self.source)[index_sampler] = self._sampler

    def length(self) -> int | None:
        """Return the length of the batch sampler."""
        return known_length(self._sampler.inner)

    def open(self, progress: Progress) -> Iterator[Any]:
        """Start the copied loader; it calls ``DroppingSampler.__iter__`` for this pass."""
        self._sampler.progress = progress
        with spare_generator(self.source, progress.seeded):
            return iter(self.source)
