"""Batches of streams and plain iterables: dropped after as little work as the source allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

from torch.utils.data import DataLoader

from e2pass.errors import LoaderError
from e2pass.smd.feed import Feed, known_length
from e2pass.smd.progress import Progress
from e2pass.smd.randomness import RandomSources, spare_generator
from e2pass.smd.schedule import Decision, DropSchedule, EpochDecisions


class _Cursor(Protocol):
    """A place in a stream. Both methods move on by one batch, or raise StopIteration at the end."""

    def take(self) -> Callable[[], Any]:
        """Return a function that gives the next batch."""

    def skip(self) -> None:
        """Leave the next batch out."""


class _IndexCursor:
    """Over a sequence: a batch that is left out is not even touched."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self._batches = batches
        self._next = 0

    def take(self) -> Callable[[], Any]:
        self.skip()
        return partial(self._batches.__getitem__, self._next - 1)

    def skip(self) -> None:
        if self._next >= len(self._batches):
            raise StopIteration
        self._next += 1


class _IteratorCursor:
    """Over an iterator: a batch that is left out is read and, with ``collate``, not collated."""

    def __init__(self, iterator: Iterator[Any], collate: _Collate | None) -> None:
        self._iterator = iterator
        self._collate = collate

    def take(self) -> Callable[[], Any]:
        batch = next(self._iterator)
        return lambda: batch

    def skip(self) -> None:
        if self._collate is None:
            next(self._iterator)
            return
        self._collate.active = False
        try:
            next(self._iterator)
        finally:
            self._collate.active = True


class _Collate:
    """A collate function that can be switched off for the batch that is about to be dropped."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.active = True
        self._function = function

    def __call__(self, samples: Any) -> Any:
        return self._function(samples) if self.active else None


class StreamedFeed(Feed):
    """The kept batches of an iterable-style ``DataLoader``, a sequence or any other iterable."""

    def __init__(self, source: Any, schedule: DropSchedule) -> None:
        super().__init__(source)
        self._schedule = schedule
        self._collate: _Collate | None = None
        if isinstance(source, DataLoader) and source.num_workers == 0:
            # Workers, if any, collate before the decision is taken, which is in the main process.
            self._collate = self.source.collate_fn = _Collate(source.collate_fn)

    def length(self) -> int | None:
        """Return the length of the source; for an iterable-style ``DataLoader`` that is torch's own estimate."""
        return known_length(self.source)

    def open(self, progress: Progress) -> Iterator[Any]:
        """Start a new pass over the source, or one that goes on after the batches already seen."""
        if progress.before_iter is None:
            progress.before_iter = self.sources.state()
            return _StreamedSteps(self._cursor(progress.seeded), progress, self._schedule, self.sources)
        with self.sources.replaying(progress.before_iter, progress.before_first) as go_on:
            cursor = self._cursor(seeded=False)
            go_on()
            for passed in range(progress.pulled):
                try:
                    cursor.skip()
                except StopIteration:
                    raise LoaderError(
                        f"the saved run had read {progress.pulled} batches of epoch {progress.epoch}, but the "
                        f"loader now has only {passed}; resume with the same data and batch size"
                    ) from None
        return _StreamedSteps(cursor, progress, self._schedule, self.sources)

    def _cursor(self, seeded: bool) -> _Cursor:
        if isinstance(self.source, Sequence):
            return _IndexCursor(self.source)
        if isinstance(self.source, DataLoader):
            with spare_generator(self.source, seeded):
                return _IteratorCursor(iter(self.source), self._collate)
        return _IteratorCursor(iter(self.source), None)


class _StreamedSteps:
    """Iterator over the kept batches of one pass; unlike a generator it survives an error of the source."""

    def __init__(self, cursor: _Cursor, progress: Progress, schedule: DropSchedule, sources: RandomSources) -> None:
        self._cursor = cursor
        self._progress = progress
        self._sources = sources
        self._decisions = _decisions_after(progress, schedule)
        self._held: Callable[[], Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        progress = self._progress
        if progress.before_first is None:
            progress.before_first = self._sources.state()
        while not progress.exhausted:
            decision = self._decisions.draw()
            try:
                batch = self._read(decision)
            except StopIteration:
                progress.exhausted = True
                break
            except Exception:
                progress.pulled += 1
                if decision is Decision.KEEP:
                    progress.in_flight.append(progress.pulled)
                raise
            progress.pulled += 1
            if decision is Decision.KEEP and batch is not None:
                progress.in_flight.append(progress.pulled)
                self._held = None
                return batch()
            self._held = batch or self._held
        return self._last()

    def _read(self, decision: Decision) -> Callable[[], Any] | None:
        if decision is not Decision.DROP:
            return self._cursor.take()
        self._cursor.skip()
        return None

    def _last(self) -> Any:
        """Return the batch held for an epoch of which nothing was kept."""
        batch, self._held = self._held, None
        if batch is None:
            raise StopIteration
        self._progress.in_flight.append(self._progress.pulled)
        return batch()


def _decisions_after(progress: Progress, schedule: DropSchedule) -> EpochDecisions:
    decisions = schedule.epoch(progress.epoch, progress.length)
    while decisions.step < progress.pulled:
        decisions.draw()
    return decisions
