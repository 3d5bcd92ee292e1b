"""The loader with SMD: epochs, positions, resuming, statistics."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from e2pass.config import SMD
from e2pass.errors import ConfigError, LoaderError
from e2pass.smd.coast import coast
from e2pass.smd.feed import Feed
from e2pass.smd.progress import Progress
from e2pass.smd.sampled import SampledFeed
from e2pass.smd.schedule import DropSchedule
from e2pass.smd.streamed import StreamedFeed

_STATE_KEYS = {"p", "seed", "progress", "own_generators", "sampler_epochs", "nominal", "yielded"}


def drop_batches(loader: Iterable[Any], smd: SMD | None = None) -> SMDLoader:
    """Return ``loader`` with stochastic mini-batch dropping.

    Args:
        loader: A ``torch.utils.data.DataLoader`` or any other iterable of batches; it is not changed.
        smd: Drop probability, seed and coasting; the default drops half of the batches.

    Raises:
        LoaderError: If ``loader`` is not an iterable of batches, is empty, or drops batches already.
        ConfigError: If ``smd`` is not an ``SMD``.
    """
    return SMDLoader(loader, SMD() if smd is None else smd)


class SMDLoader:
    """A loader whose batches are dropped with probability ``smd.p`` (E2-Train, section 3.1).

    Of a map-style ``DataLoader`` dropped batches are never fetched, decoded or collated, for any number of workers
    and any sampler: a copy of the loader gets a batch sampler that leaves them out. Of other sources they are read
    and discarded, or not even read where the source is a sequence. Attributes that this class has not are those of
    the wrapped loader.

    Each ``__iter__`` starts the next epoch; ``set_epoch`` says which. What is dropped depends on ``smd``, the epoch
    and the step in it only (see DropSchedule), so all ranks of a distributed run drop the same steps. An epoch is
    never empty.

    ``smd.coast`` lets dropped steps apply momentum and weight decay; the optimizer is then to be given to ``coast``.
    """

    def __init__(self, loader: Iterable[Any], smd: SMD) -> None:
        if not isinstance(smd, SMD):
            raise ConfigError(f"smd is a {type(smd).__name__}; give an e2pass.SMD such as SMD(p=0.5)")
        _check(loader)
        self.smd = smd
        self.schedule = DropSchedule(smd.p, smd.seed)
        self._loader = loader
        self._epoch = 0
        self._progress: Progress | None = None
        self._pending: Progress | None = None
        self._nominal = 0
        self._yielded = 0
        self._attach()
        if self._feed.length() == 0:
            raise LoaderError(f"the loader is empty: {_empty_hint(loader)}")

    def _attach(self) -> None:
        """Make everything that is bound to this process and is neither copied nor pickled."""
        self._optimizers: list[torch.optim.Optimizer] = []
        self._steps: weakref.ref[_Steps] | None = None
        self._feed: Feed = _feed(self._loader, self.schedule)

    # Iterating

    def __iter__(self) -> Iterator[Any]:
        """Start the next epoch, or continue the one that ``load_state_dict`` was told of."""
        if self.smd.coast and not self._optimizers:
            raise LoaderError(
                "SMD(coast=True) needs the optimizer that coasts through dropped steps; "
                "call loader.coast(optimizer) first"
            )
        progress = self._coming()
        if progress.length == 0:
            raise LoaderError(f"the loader is empty: {_empty_hint(self._loader)}")
        steps = _Steps(self, progress, self._feed.open(progress))
        progress.seeded = True
        self._progress, self._pending, self._epoch = progress, None, progress.epoch + 1
        self._steps = weakref.ref(steps)
        return steps

    def _coming(self) -> Progress:
        """Return the pass that the next ``__iter__`` makes."""
        return self._pending or Progress(self._epoch, self._feed.length())

    def _current(self) -> Progress | None:
        """Return the pass that is being iterated over, if any."""
        alive = self._steps is not None and self._steps() is not None
        return self._progress if alive and self._progress is not None and not self._progress.finished else None

    def _advance(self, progress: Progress, position: int, yielded: int) -> None:
        """Count the steps up to ``position``, of which ``yielded`` were not dropped, and coast through the others."""
        steps = position - progress.position
        progress.position = position
        progress.yielded += yielded
        self._nominal += steps
        self._yielded += yielded
        for optimizer in self._optimizers:
            coast(optimizer, steps - yielded)

    def __len__(self) -> int:
        """Return how many batches the current pass yields in all or, between passes, the next one will.

        A pass resumed by ``load_state_dict`` yields what was left of its epoch. Over an iterable-style ``DataLoader``
        the number rests on torch's estimate of its length.

        Raises:
            TypeError: If the length of the wrapped loader is not known.
        """
        progress = self._current() or self._coming()
        return self.schedule.count(progress.epoch, self._known(progress.length)) - progress.resumed

    def _known(self, length: int | None) -> int:
        if length is None:
            raise TypeError(
                f"the number of batches is not known: the {type(self._loader).__name__} or its sampler has no len()"
            )
        return length

    def expected_steps(self, epochs: int) -> int:
        """Return how many batches epochs 0 to ``epochs - 1`` yield together.

        The number is exact, as the seed fixes all decisions. It is the ``total_steps`` of a schedule that steps once
        per executed batch.

        Raises:
            TypeError: If the length of the wrapped loader is not known.
        """
        length = self._known(self._feed.length())
        return sum(self.schedule.count(epoch, length) for epoch in range(epochs))

    # Epochs, optimizers, statistics

    @property
    def epoch(self) -> int:
        """Number of the current epoch or, between epochs, of the next one."""
        return (self._current() or self._coming()).epoch

    def set_epoch(self, epoch: int) -> None:
        """Let the next ``__iter__`` run epoch ``epoch``, and tell every sampler and dataset that has ``set_epoch``.

        Naming the epoch in the middle of which the loader was saved keeps the place in it; any other starts afresh.

        Raises:
            LoaderError: If ``epoch`` is not an integer from 0 up.
        """
        if not isinstance(epoch, int) or epoch < 0:
            raise LoaderError(f"the epoch is {epoch!r}; it must be an integer from 0 up")
        self._feed.set_epoch(epoch)
        self._epoch = epoch
        if self._pending is not None and self._pending.epoch != epoch:
            self._pending = None
        if self._current() is None:
            self._progress = None

    def coast(self, optimizer: torch.optim.Optimizer) -> None:
        """Register an optimizer that makes one step with zero gradients for each dropped batch (``SMD(coast=True)``).

        The steps are made when the loader passes the dropped batches: just before it hands out the batch after them,
        or ends the epoch. Several optimizers can be registered; copies and pickles of the loader have none.

        Raises:
            LoaderError: If ``smd.coast`` is off or ``optimizer`` is not an optimizer.
        """
        if not self.smd.coast:
            raise LoaderError("dropped steps do nothing with SMD(coast=False); coasting needs SMD(coast=True)")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise LoaderError(f"a {type(optimizer).__name__} cannot coast; give a torch.optim.Optimizer")
        if all(optimizer is not known for known in self._optimizers):
            self._optimizers.append(optimizer)

    def stats(self) -> dict[str, int]:
        """Return the steps passed so far, in all epochs: ``nominal``, of which ``yielded`` and ``dropped``."""
        return {"nominal": self._nominal, "yielded": self._yielded, "dropped": self._nominal - self._yielded}

    # Saving

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on after the last batch that was yielded.

        It holds the place in the epoch, the random state that the epoch's order was drawn from, the loader's own
        generators and the statistics. The global random state is the caller's to save and restore.
        ``torch.load(weights_only=True)`` reads it. An epoch left by ``break`` counts as being in its middle until the
        next one starts.
        """
        progress = self._pending or self._progress
        if progress is None or progress.finished:
            progress = self._coming()
            progress.seeded = self._feed.workers_alive()
        elif not self._feed.in_order():
            warnings.warn(
                "the loader has in_order=False, so which batches its workers have in hand is not known; a run "
                "resumed from this state may repeat or miss some of them",
                stacklevel=2,
            )
        return {
            "p": self.smd.p,
            "seed": self.smd.seed,
            "progress": progress.state_dict(),
            "own_generators": self._feed.sources.own_state(),
            "sampler_epochs": self._feed.sampler_epochs(),
            "nominal": self._nominal,
            "yielded": self._yielded,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next ``__iter__`` go on where ``state`` was saved.

        The batches already seen are not fetched again: their indices are sampled anew, from the saved random state,
        and passed over. (A stream has no indices; it is read up to the place, without collating where there are no
        workers.)

        Raises:
            LoaderError: If ``state`` is not of an SMDLoader with the same ``p``, ``seed``, epoch length and generators.
        """
        self._check_state(state)
        progress = Progress(**state["progress"])
        progress.resumed = progress.yielded
        self._feed.sources.restore_own(state["own_generators"])
        self._feed.restore_sampler_epochs(state["sampler_epochs"])
        self._feed.restart()
        self._pending, self._progress, self._steps = progress, None, None
        self._epoch = progress.epoch
        self._nominal, self._yielded = state["nominal"], state["yielded"]

    def _check_state(self, state: Mapping[str, Any]) -> None:
        if not isinstance(state, Mapping) or set(state) != _STATE_KEYS:
            raise LoaderError(
                f"this is not the state of an SMDLoader; that has the keys {', '.join(sorted(_STATE_KEYS))}"
            )
        if (state["p"], state["seed"]) != (self.smd.p, self.smd.seed):
            raise LoaderError(
                f"the state was saved with SMD(p={state['p']}, seed={state['seed']}), but this loader has "
                f"SMD(p={self.smd.p}, seed={self.smd.seed}), which drops other batches"
            )
        saved, length = state["progress"], self._feed.length()
        if saved["pulled"] and saved["length"] != length:
            raise LoaderError(
                f"the state was saved in the middle of an epoch of {saved['length']} batches, but this loader has "
                f"{length}; resume with the same dataset and batch size"
            )
        here = (len(self._feed.sources.own_state()), len(self._feed.sampler_epochs()))
        if (len(state["own_generators"]), len(state["sampler_epochs"])) != here:
            raise LoaderError(
                "the state was saved with other random generators or epoch-aware samplers than this loader's; "
                "build the loader as it was"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_feed", "_steps", "_optimizers")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._attach()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # private names are not passed on; they may also be absent while a copy is being made
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._loader, name)

    def __repr__(self) -> str:
        return f"SMDLoader({self._loader!r}, {self.smd!r})"


class _Steps:
    """Iterator over the batches of one pass; what it knows of the place is in its ``Progress``, which outlives it."""

    def __init__(self, loader: SMDLoader, progress: Progress, batches: Iterator[Any]) -> None:
        self._loader = loader
        self._progress = progress
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        progress = self._progress
        if progress.finished:
            raise StopIteration
        try:
            batch = next(self._batches)
        except StopIteration:
            self._finish()
            raise
        except Exception:
            if progress.in_flight:  # the source goes on after the batch that failed, and so must the position
                self._loader._advance(progress, progress.in_flight.popleft(), 1)
            raise
        if not progress.in_flight:
            raise LoaderError(
                f"{type(self._loader._loader).__name__} yields batches without asking its batch sampler, so none "
                "can be dropped there; wrap it in an object that is only iterable"
            )
        self._loader._advance(progress, progress.in_flight.popleft(), 1)
        return batch

    def _finish(self) -> None:
        progress = self._progress
        progress.finished = True
        if progress.pulled == 0:
            raise LoaderError(_no_batch(self._loader._loader, progress))
        self._loader._advance(progress, progress.pulled, 0)


def _feed(loader: Any, schedule: DropSchedule) -> Feed:
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        return SampledFeed(loader, schedule)
    return StreamedFeed(loader, schedule)


def _check(loader: Any) -> None:
    """Refuse what is no source of batches."""
    kind = type(loader).__name__
    if isinstance(loader, SMDLoader):
        raise LoaderError("this loader drops batches already; give the loader that it wraps")
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise LoaderError(f"a {kind} is a dataset, not a loader; wrap it in a torch.utils.data.DataLoader")
    if isinstance(loader, (str, bytes, Mapping, torch.Tensor, torch.nn.Module)) or not hasattr(loader, "__iter__"):
        raise LoaderError(f"a {kind} is not a loader; give a torch DataLoader or another iterable of batches")


def _empty_hint(loader: Any) -> str:
    if isinstance(loader, DataLoader) and loader.drop_last:
        return "its dataset has fewer samples than one batch, and drop_last=True leaves out the rest"
    return "it has no batch; give one with at least one sample"


def _no_batch(loader: Any, progress: Progress) -> str:
    if hasattr(loader, "__next__") and progress.epoch > 0:
        return (
            f"the loader is a one-shot iterator ({type(loader).__name__}) and had no batch left for epoch "
            f"{progress.epoch}; give an object whose __iter__ starts anew, such as a list or a DataLoader"
        )
    return f"the loader is empty: it yielded no batch in epoch {progress.epoch}"
