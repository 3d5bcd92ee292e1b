"""A resumed run against the run that was never interrupted: same batches and losses, nothing fetched twice."""

from __future__ import annotations

import io
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    Subset,
    WeightedRandomSampler,
)

from e2pass.config import SMD
from e2pass.errors import LoaderError
from e2pass.smd import SMDLoader, drop_batches
from tests.smd_data import Counting, Stream, Unsized, dropping, values

EPOCHS = 3


def generator(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class PythonShuffle(Sampler[int]):
    """Shuffles with a ``random.Random`` of its own, or with the global one."""

    def __init__(self, n: int, own: bool) -> None:
        self.n = n
        self.rng = random.Random(3) if own else None

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.n))
        (self.rng or random).shuffle(order)
        return iter(order)


class NumpyShuffle(PythonShuffle):
    """Shuffles with a numpy generator of its own, or with the global one."""

    def __init__(self, n: int, own: bool) -> None:
        super().__init__(n, own=False)
        self.numpy_rng = np.random.default_rng(3) if own else None

    def __iter__(self) -> Iterator[int]:
        if self.numpy_rng is not None:
            return iter(self.numpy_rng.permutation(self.n).tolist())
        return iter(np.random.permutation(self.n).tolist())


class Singles(Sampler[list[int]]):
    """A batch sampler that does not tell its length."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[list[int]]:
        return ([index] for index in range(self.n))


class ShuffledStream(Stream):
    """Draws its order from the global generator when its first sample is asked for."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        yield from torch.randperm(self.n)


class ShuffledBatches(Unsized):
    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(self.n).tolist()


def shared(**settings: Any) -> dict[str, Any]:
    return {"shuffle": True, "generator": generator(), **settings}


LOADERS: dict[str, Callable[[Counting], Any]] = {
    "in order": lambda d: DataLoader(d, 2),
    "shuffled": lambda d: DataLoader(d, 2, shuffle=True),
    "own generator": lambda d: DataLoader(d, 2, **shared()),
    "samples": lambda d: DataLoader(d, None, **shared()),
    "subset": lambda d: DataLoader(Subset(d, range(3, len(d))), 2, shuffle=True),
    "replacement": lambda d: DataLoader(d, 2, sampler=RandomSampler(d, True, 71, generator=generator())),
    # Ends with one more draw from its generator, which workers reach long before the user does.
    "two passes": lambda d: DataLoader(d, 2, sampler=RandomSampler(d, num_samples=2 * len(d), generator=generator())),
    "weighted": lambda d: DataLoader(d, 2, sampler=WeightedRandomSampler([1.0, 2.0] * (len(d) // 2), len(d))),
    "batch sampler": lambda d: DataLoader(d, batch_sampler=BatchSampler(RandomSampler(d), 3, drop_last=True)),
    "distributed": lambda d: DataLoader(d, 2, sampler=DistributedSampler(d, 2, 1)),
    "random": lambda d: DataLoader(d, 2, sampler=PythonShuffle(len(d), own=False)),
    "own random": lambda d: DataLoader(d, 2, sampler=PythonShuffle(len(d), own=True)),
    "numpy": lambda d: DataLoader(d, 2, sampler=NumpyShuffle(len(d), own=False)),
    "own numpy": lambda d: DataLoader(d, 2, sampler=NumpyShuffle(len(d), own=True)),
}
STREAMS: dict[str, Callable[[Counting], Any]] = {
    "list": lambda d: list(range(len(d))),
    "unsized": lambda d: ShuffledBatches(len(d)),
    "stream": lambda d: DataLoader(ShuffledStream(len(d)), 2),
    "stream, own generator": lambda d: DataLoader(ShuffledStream(len(d)), 2, generator=generator()),
}


def global_state() -> Any:
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def restore_global(state: Any) -> None:
    torch.set_rng_state(state[0])
    random.setstate(state[1])
    np.random.set_state(state[2])


def run(loader: SMDLoader, first: int = 0, stop: int | None = None) -> list[Any]:
    """Train for the epochs from ``first`` on, at most ``stop`` steps; return what the steps saw and their dropout."""
    trace: list[Any] = []
    for epoch in range(first, EPOCHS):
        loader.set_epoch(epoch)
        for batch in loader:
            trace.append((epoch, torch.as_tensor(batch).tolist(), torch.rand(()).item()))
            if stop is not None and len(trace) == stop:
                return trace
    return trace


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """Return ``state`` as it comes back from disk."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("kind", [*LOADERS, *STREAMS])
@settings(max_examples=12)
@given(data=st.data(), p=st.sampled_from([0.0, 0.5, 0.8]))
def test_resume_from_any_position_continues_the_same_sequence(kind: str, data: st.DataObject, p: float) -> None:
    make = {**LOADERS, **STREAMS}[kind]
    smd = SMD(p=p, seed=1)
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    start = global_state()
    full = run(drop_batches(make(Counting(40, noise=True)), smd))

    restore_global(start)
    stop = data.draw(st.integers(1, len(full)))
    interrupted = drop_batches(make(Counting(40, noise=True)), smd)
    seen = run(interrupted, stop=stop)
    state, world = saved(interrupted.state_dict()), global_state()
    torch.manual_seed(99), random.seed(99), np.random.seed(99)

    fresh = Counting(40, noise=True)
    resumed = drop_batches(make(fresh), smd)
    resumed.load_state_dict(state)
    restore_global(world)
    assert resumed.epoch == seen[-1][0]
    left = len(resumed) if kind in {*LOADERS, "list"} else None
    rest = run(resumed, first=resumed.epoch)

    assert seen + rest == full
    assert resumed.stats()["yielded"] == len(full)
    if left is not None:
        assert left == sum(epoch == seen[-1][0] for epoch, _, _ in rest)
    if kind in LOADERS:  # a stream has to be read again, a sampler's batches need not be
        assert int(fresh.fetched.sum()) == sum(torch.tensor(batch).numel() for _, batch, _ in rest)


@pytest.mark.parametrize("kind", ["shuffled", "own generator", "two passes", "distributed"])
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("stop", [1, 9, 14])
def test_resume_with_workers_that_run_ahead(kind: str, persistent: bool, stop: int) -> None:
    def make(data: Counting) -> SMDLoader:
        plain = LOADERS[kind](data)
        # The settings a user would have given; only these loaders are rebuilt here.
        return drop_batches(
            DataLoader(
                data, 2, sampler=plain.sampler, generator=plain.generator, num_workers=2, persistent_workers=persistent
            ),
            SMD(seed=1),
        )

    torch.manual_seed(0)
    full = run(make(Counting(20)))
    torch.manual_seed(0)
    interrupted = make(Counting(20))
    seen = run(interrupted, stop=stop)
    state, world = saved(interrupted.state_dict()), torch.get_rng_state()
    torch.manual_seed(99)
    fresh = Counting(20)
    resumed = make(fresh)
    resumed.load_state_dict(state)
    torch.set_rng_state(world)
    rest = run(resumed, first=resumed.epoch)
    assert seen + rest == full
    wanted = Counter(int(index) for _, batch, _ in rest for index in batch)
    assert fresh.fetched.tolist() == [wanted[index] for index in range(20)]


def test_losses_of_a_resumed_run_are_bit_equal() -> None:
    def build() -> tuple[SMDLoader, nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 1))
        loader = dropping(Counting(64, noise=True), batch_size=5, shuffle=True)
        return loader, model, torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)

    def train(parts: Any, stop: int | None = None) -> list[float]:
        loader, model, optimizer = parts
        losses: list[float] = []
        for _ in range(loader.epoch, EPOCHS):
            for batch in loader:
                optimizer.zero_grad()
                loss = (model(batch[:, None] / 64) - batch[:, None]).square().mean()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
                if len(losses) == stop:
                    return losses
        return losses

    full = train(build())
    for stop in range(1, len(full)):
        parts: Any = build()
        losses = train(parts, stop)
        state = [part.state_dict() for part in parts]
        world = torch.get_rng_state()
        parts = build()
        for part, part_state in zip(parts, state, strict=True):
            part.load_state_dict(part_state)
        torch.set_rng_state(world)
        assert losses + train(parts) == full


@pytest.mark.parametrize("workers", [0, 2])
def test_state_between_epochs_and_before_the_first_batch(workers: int) -> None:
    def make() -> SMDLoader:
        more = {"num_workers": workers, "persistent_workers": workers > 0}
        return dropping(Counting(20), batch_size=2, shuffle=True, **more)

    def resume(state: Any, world: torch.Tensor) -> list[list[list[int]]]:
        torch.manual_seed(99)
        loader = make()
        loader.load_state_dict(saved(state))
        torch.set_rng_state(world)
        return [values(loader) for _ in range(EPOCHS - loader.epoch)]

    torch.manual_seed(0)
    loader = make()
    states = [(loader.state_dict(), torch.get_rng_state())]
    epochs = []
    for _ in range(EPOCHS):
        steps = iter(loader)
        states.append((loader.state_dict(), torch.get_rng_state()))
        epochs.append(values(steps))
        states.append((loader.state_dict(), torch.get_rng_state()))
    for index, state in enumerate(states):
        assert resume(*state) == epochs[index // 2 :]


def test_a_loaded_state_can_be_saved_again_before_it_is_used() -> None:
    def make() -> SMDLoader:
        return dropping(Counting(40), batch_size=2, shuffle=True)

    loader, again, third = make(), make(), make()
    steps = iter(loader)
    next(steps)
    again.load_state_dict(saved(loader.state_dict()))
    third.load_state_dict(saved(again.state_dict()))
    assert values(third) == values(again) == values(steps)


@pytest.mark.parametrize("plain", [lambda: LOADERS["shuffled"](Counting(40)), lambda: STREAMS["stream"](Counting(40))])
def test_loaders_whose_random_numbers_interleave(plain: Callable[[], Any]) -> None:
    # zip() makes both iterators before it draws from either.
    def make() -> list[SMDLoader]:
        return [drop_batches(plain(), SMD(seed=seed)) for seed in (0, 1)]

    torch.manual_seed(0)
    pair = make()
    seen, states, world = [], [], torch.get_rng_state()
    for step, batches in enumerate(zip(*pair, strict=False)):
        seen.append(values(batches))
        if step == 2:
            states, world = [saved(loader.state_dict()) for loader in pair], torch.get_rng_state()
    torch.manual_seed(99)
    pair = make()
    for loader, state in zip(pair, states, strict=True):
        loader.load_state_dict(state)
    torch.set_rng_state(world)
    assert [values(batches) for batches in zip(*pair, strict=False)] == seen[3:]


@pytest.mark.parametrize(
    "make", [lambda: DataLoader(Counting(9), batch_sampler=Singles(3)), lambda: Unsized(3), lambda: [0, 1, 2]]
)
def test_the_only_batch_of_an_epoch_is_not_repeated(make: Callable[[], Any]) -> None:
    singles = 0
    for seed in range(30):
        smd = SMD(p=0.9, seed=seed)
        loader, states, got = drop_batches(make(), smd), [], []
        for batch in loader:
            got.append(batch)
            states.append(saved(loader.state_dict()))
        singles += len(got) == 1
        for index, state in enumerate(states, start=1):
            resumed = drop_batches(make(), smd)
            resumed.load_state_dict(state)
            assert list(resumed) == got[index:]
            assert resumed.stats() == loader.stats()
    assert singles > 15


def test_the_epoch_of_the_sampler_is_restored() -> None:
    def make() -> SMDLoader:
        data = Counting(40)
        return dropping(data, batch_size=2, sampler=DistributedSampler(data, 2, 0))

    loader = make()
    loader.set_epoch(5)
    steps = iter(loader)
    next(steps)
    resumed = make()
    resumed.load_state_dict(saved(loader.state_dict()))
    assert values(resumed) == values(steps)


def test_going_back_in_a_live_loader_starts_its_workers_anew() -> None:
    loader = dropping(Counting(20), batch_size=2, shuffle=True, num_workers=2, persistent_workers=True)
    torch.manual_seed(0)
    state, world = loader.state_dict(), torch.get_rng_state()
    first, after = values(loader), torch.get_rng_state()
    loader.load_state_dict(state)
    torch.set_rng_state(world)
    assert values(loader) == first
    assert torch.equal(torch.get_rng_state(), after)


def test_naming_the_epoch_keeps_the_place_and_another_one_leaves_it() -> None:
    loader = dropping(Counting(40), batch_size=2)
    next(iter(loader))
    state = loader.state_dict()
    whole = values(dropping(Counting(40), batch_size=2))
    loader.load_state_dict(state)
    loader.set_epoch(0)
    assert values(loader) == whole[1:]
    loader.load_state_dict(state)
    loader.set_epoch(1)
    assert len(values(loader)) == loader.schedule.count(1, 20)


def test_out_of_order_workers_warn() -> None:
    loader = dropping(Counting(20), batch_size=2, num_workers=2, in_order=False)
    for _ in loader:
        with pytest.warns(UserWarning, match="in_order=False"):
            loader.state_dict()
        break


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda: dropping(Counting(40), 0.4, batch_size=2),
            r"p=0.5, seed=0\), but .* SMD\(p=0.4",
        ),
        (lambda: dropping(Counting(40), seed=3, batch_size=2), "drops other batches"),
        (lambda: dropping(Counting(40), batch_size=4), "epoch of 20 batches, but this loader has 10"),
        (lambda: dropping(Counting(40), batch_size=2, generator=generator()), "other random generators"),
    ],
)
def test_states_of_other_loaders(other: Callable[[], SMDLoader], message: str) -> None:
    loader = dropping(Counting(40), batch_size=2)
    next(iter(loader))
    with pytest.raises(LoaderError, match=message):
        other().load_state_dict(loader.state_dict())


def test_no_state() -> None:
    with pytest.raises(LoaderError, match="not the state of an SMDLoader"):
        drop_batches([1]).load_state_dict({"epoch": 3})


@pytest.mark.parametrize(
    "make", [lambda n: dropping(Counting(40), batch_sampler=Singles(n)), lambda n: drop_batches(Unsized(n))]
)
def test_less_data_than_before(make: Callable[[int], SMDLoader]) -> None:
    loader = make(40)
    steps = iter(loader)
    for _ in range(8):
        next(steps)
    other = make(2)
    other.load_state_dict(loader.state_dict())
    with pytest.raises(LoaderError, match=r"now has only 2; resume with the same data"):
        list(other)
