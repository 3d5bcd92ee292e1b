"""The loader with dropped batches: which come, what is fetched, every form of source, every kind of bad input."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from e2pass.config import SMD
from e2pass.errors import ConfigError, LoaderError
from e2pass.smd import DropSchedule, SMDLoader, drop_batches
from tests.smd_data import Counting, SizedStream, Stream, Unsized, dropping, values


def expected(n: int, batch_size: int, epoch: int = 0, p: float = 0.5, seed: int = 0) -> list[list[int]]:
    """Return the kept batches of 0..n-1 in order, cut and chosen without any loader."""
    batches = [list(range(start, min(start + batch_size, n))) for start in range(0, n, batch_size)]
    keeps = DropSchedule(p, seed).keeps(epoch, len(batches))
    return [batch for batch, keep in zip(batches, keeps, strict=True) if keep]


# Which batches come


@given(
    n=st.integers(1, 40),
    batch_size=st.integers(1, 9),
    p=st.sampled_from([0.0, 0.3, 0.5, 0.9]),
    seed=st.integers(0, 5),
)
def test_kept_batches_come_in_order_and_len_counts_them(n: int, batch_size: int, p: float, seed: int) -> None:
    loader = dropping(Counting(n), p, seed, batch_size=batch_size)
    nominal = -(-n // batch_size)
    for epoch in range(3):
        assert loader.epoch == epoch
        length = len(loader)
        got = values(loader)
        assert got == expected(n, batch_size, epoch, p, seed)
        assert length == len(got) >= 1
    stats = loader.stats()
    assert stats["nominal"] == 3 * nominal == stats["yielded"] + stats["dropped"]


@given(n=st.integers(1, 40), batch_size=st.integers(1, 9), p=st.sampled_from([0.3, 0.5, 0.9]))
def test_dropped_batches_are_never_fetched(n: int, batch_size: int, p: float) -> None:
    data = Counting(n)
    loader = dropping(data, p, batch_size=batch_size, shuffle=True)
    seen = Counter(index for _ in range(3) for batch in values(loader) for index in batch)
    assert dict(enumerate(data.fetched.tolist())) == {index: seen[index] for index in range(n)}


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_see_the_same_batches_and_fetch_no_other(persistent: bool) -> None:
    runs, counts = [], []
    for workers in (0, 2):
        data = Counting(50)
        torch.manual_seed(3)
        more = {"persistent_workers": persistent, "prefetch_factor": 3} if workers else {}
        loader = dropping(data, batch_size=4, shuffle=True, num_workers=workers, **more)
        runs.append([values(loader) for _ in range(2 + persistent)])
        counts.append(data.fetched.tolist())
    for first, second in zip(*runs, strict=True):
        assert len(first) == len(second)
    assert runs[0][0] == runs[1][0]  # later epochs of persistent workers draw one random number less, as in torch
    if not persistent:
        assert runs[0] == runs[1]
    seen = Counter(index for epoch in runs[1] for batch in epoch for index in batch)
    assert counts[1] == [seen[index] for index in range(50)]


@pytest.mark.parametrize("workers", [0, 2])
def test_without_dropping_it_is_the_loader_itself(workers: int) -> None:
    plain = DataLoader(Counting(30, noise=True), batch_size=4, shuffle=True, num_workers=workers)
    torch.manual_seed(5)
    reference = [torch.cat(list(plain)) for _ in range(2)]
    after = torch.get_rng_state()
    torch.manual_seed(5)
    loader = drop_batches(plain, SMD(p=0.0))
    assert all(torch.equal(torch.cat(list(loader)), epoch) for epoch in reference)
    assert torch.equal(torch.get_rng_state(), after)


@given(ranks=st.integers(1, 4), n=st.integers(4, 40), shuffle=st.booleans())
def test_all_ranks_drop_the_same_steps(ranks: int, n: int, shuffle: bool) -> None:
    data = Counting(n)
    samplers: list[Any] = [DistributedSampler(data, ranks, rank, shuffle=shuffle) for rank in range(ranks)]
    loaders = [dropping(data, batch_size=2, sampler=sampler) for sampler in samplers]
    for epoch in (0, 3):
        for loader in loaders:
            loader.set_epoch(epoch)
        assert {sampler.epoch for sampler in samplers} == {epoch}
        keeps = list(loaders[0].schedule.keeps(epoch, len(loaders[0].batch_sampler)))
        for loader, sampler in zip(loaders, samplers, strict=True):
            nominal = list(BatchSampler(sampler, 2, drop_last=False))
            assert values(loader) == [batch for batch, keep in zip(nominal, keeps, strict=True) if keep]


@settings(max_examples=10)
@given(p=st.sampled_from([0.25, 0.5, 0.75]), seed=st.integers(0, 100))
def test_each_samples_share_tends_to_one_minus_p(p: float, seed: int) -> None:
    data, epochs = Counting(12), 300
    torch.manual_seed(seed)
    loader = dropping(data, p, seed, batch_size=2, shuffle=True)
    for _ in range(epochs):
        for _ in loader:
            pass
    five_sigma = 5 * (p * (1 - p) / epochs) ** 0.5
    assert (data.fetched / epochs - (1 - p)).abs().max() <= five_sigma


class Shards(Sampler[list[int]]):
    """A batch sampler of its own kind, with batches of different sizes, by epoch, and perhaps without a length."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[self.epoch], [1, 2, 3], [4, 5], [6], [7, 8, 9]])


def test_custom_batch_sampler_without_length() -> None:
    loader = dropping(Counting(10), batch_sampler=Shards())
    with pytest.raises(TypeError, match=r"number of batches is not known: the DataLoader or its sampler has no len"):
        len(loader)
    for epoch in range(20):
        loader.set_epoch(epoch % 4)
        got = values(loader)
        assert got
        assert all(batch in [[epoch % 4], [1, 2, 3], [4, 5], [6], [7, 8, 9]] for batch in got)


@pytest.mark.parametrize(
    "sampler",
    [SequentialSampler, RandomSampler, lambda data: WeightedRandomSampler([1.0] * 30, 20), lambda data: list(range(9))],
)
def test_any_sampler_with_and_without_batches(sampler: Callable[[Any], Any]) -> None:
    for batch_size in (None, 1, 4):
        data = Counting(30)
        loader = dropping(data, batch_size=batch_size, sampler=sampler(data))
        length, got = len(loader), list(loader)
        assert length == len(got)
        assert int(data.fetched.sum()) == sum(batch.numel() for batch in got)


def test_settings_and_subclass_attributes_are_kept_and_the_original_is_untouched() -> None:
    class Named(DataLoader[Tensor]):
        def __init__(self, name: str) -> None:
            super().__init__(
                Counting(12), 3, num_workers=1, timeout=7, generator=torch.Generator(),
                multiprocessing_context=multiprocessing.get_context("fork"), prefetch_factor=4, in_order=False,
                worker_init_fn=print, collate_fn=torch.stack, persistent_workers=True,
            )  # fmt: skip
            self.name = name

    plain = Named("train")
    before = dict(vars(plain))
    loader = drop_batches(plain)
    list(loader)
    assert vars(plain) == before
    assert (loader.name, loader.batch_size, loader.dataset, loader.drop_last) == ("train", 3, plain.dataset, False)
    assert (loader.batch_sampler, loader.sampler, loader.num_workers) == (plain.batch_sampler, plain.sampler, 1)
    with pytest.raises(AttributeError):
        loader.nonsense  # noqa: B018


# Epochs


def test_leaving_an_epoch_early_starts_the_next_one() -> None:
    loader = dropping(Counting(40), batch_size=2)
    for _ in loader:
        assert len(loader) == len(expected(40, 2, 0))
        break
    assert loader.epoch == 1
    assert len(loader) == len(expected(40, 2, 1))
    assert values(loader) == expected(40, 2, 1)
    loader.set_epoch(0)
    assert values(loader) == expected(40, 2, 0)


@pytest.mark.parametrize("persistent", [False, True])
def test_leaving_an_epoch_early_with_workers(persistent: bool) -> None:
    loader = dropping(Counting(40), batch_size=2, num_workers=2, persistent_workers=persistent)
    for _ in loader:
        break
    assert values(loader) == expected(40, 2, 1)


def test_expected_steps_is_exact() -> None:
    loader = dropping(Counting(41), batch_size=3)
    assert loader.expected_steps(4) == sum(len(values(loader)) for _ in range(4))


@pytest.mark.parametrize("epoch", [-1, 1.5, "2"])
def test_bad_epoch(epoch: Any) -> None:
    with pytest.raises(LoaderError, match="must be an integer from 0 up"):
        dropping(Counting(4)).set_epoch(epoch)


# Streams and other iterables


@given(n=st.integers(1, 30), batch_size=st.integers(1, 7), p=st.sampled_from([0.0, 0.5, 0.9]))
def test_sized_stream(n: int, batch_size: int, p: float) -> None:
    loader = dropping(SizedStream(n), p, batch_size=batch_size)
    for epoch in range(3):
        length, got = len(loader), values(loader)
        assert got == expected(n, batch_size, epoch, p)
        assert length == len(got)


def test_dropped_batches_of_a_stream_are_not_collated() -> None:
    collated: list[list[int]] = []

    def collate(samples: list[Tensor]) -> Tensor:
        collated.append([int(sample) for sample in samples])
        return torch.stack(samples)

    got = values(dropping(SizedStream(200), batch_size=2, collate_fn=collate))
    held = [batch for batch in collated if batch not in got]
    assert got == expected(200, 2)
    assert all(batch < got[0] for batch in held)  # only such as might have been the one batch of an empty epoch


def test_stream_with_workers() -> None:
    plain = DataLoader(Stream(20), batch_size=3, num_workers=2)
    keeps = DropSchedule(0.5).epoch(0)
    kept = [batch for batch in values(plain) if keeps.draw().value == "keep"]
    assert values(drop_batches(plain)) == kept


def test_sequences_are_not_even_touched_where_dropped() -> None:
    touched: list[int] = []

    class Lazy(list[int]):
        def __getitem__(self, index: Any) -> Any:
            touched.append(index)
            return super().__getitem__(index)

    loader = drop_batches(Lazy(range(50)))
    assert len(loader) == len(list(loader)) == len(touched) < 50
    assert touched == [batch[0] for batch in expected(50, 1)]


@given(n=st.integers(1, 6), p=st.sampled_from([0.5, 0.95]), seed=st.integers(0, 50))
def test_unsized_iterables_are_never_empty_either(n: int, p: float, seed: int) -> None:
    loader = drop_batches(Unsized(n), SMD(p=p, seed=seed))
    for _ in range(4):
        got = list(loader)
        assert len(got) >= 1
        assert got == sorted(set(got))
        assert set(got) <= set(range(n))
    assert loader.stats()["nominal"] == 4 * n
    with pytest.raises(TypeError, match="Unsized or its sampler has no len"):
        len(loader)


def test_endless_iterables() -> None:
    class Endless:
        def __iter__(self) -> Iterator[int]:
            step = 0
            while True:
                yield step
                step += 1

    got = [batch for batch, _ in zip(drop_batches(Endless()), range(1000), strict=False)]
    assert got == sorted(set(got))
    assert 1800 < got[-1] < 2200


def test_one_shot_iterators() -> None:
    loader = drop_batches(iter(range(20)))
    assert list(loader)
    with pytest.raises(LoaderError, match=r"one-shot iterator .* no batch left for epoch 1"):
        list(loader)


class FaultyMap(Counting):
    """Fails at one sample."""

    bad = -1

    def __getitem__(self, index: int) -> Tensor:
        if index == self.bad:
            raise OSError("bad record")
        return super().__getitem__(index)


class FaultyStream(SizedStream):
    """Fails at one sample and can go on after it."""

    bad = -1

    def __iter__(self) -> Iterator[Tensor]:
        data = FaultyMap(self.n)
        data.bad = self.bad
        return map(data.__getitem__, range(self.n))


@pytest.mark.parametrize("data", [FaultyMap(20), FaultyStream(20)])
def test_the_sequence_goes_on_after_an_error(data: Any) -> None:
    kept = [batch[0] for batch in expected(20, 1)]
    data.bad = kept[2]
    loader = dropping(data, batch_size=1)
    steps = iter(loader)
    assert [int(next(steps)) for _ in range(2)] == kept[:2]
    with pytest.raises(OSError, match="bad record"):
        next(steps)
    assert [int(batch) for batch in steps] == kept[3:]
    assert loader.stats() == {"nominal": 20, "yielded": len(kept), "dropped": 20 - len(kept)}


# Bad input


class Forgetful(DataLoader[Tensor]):
    """A loader that bypasses its batch sampler."""

    def __iter__(self) -> Any:
        return iter([torch.zeros(1)])


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (7, "a int is not a loader"),
        ("abc", "a str is not a loader"),
        ({"a": 1}, "a dict is not a loader"),
        (nn.Sequential(), "a Sequential is not a loader"),
        (TensorDataset(torch.ones(3)), "a TensorDataset is a dataset, not a loader; wrap it in"),
        ([], "the loader is empty"),
        (DataLoader(Counting(3), batch_size=4, drop_last=True), "fewer samples than one batch, and drop_last=True"),
        (DataLoader(SizedStream(0)), "the loader is empty"),
        (drop_batches([1]), "drops batches already"),
    ],
)
def test_bad_loaders(loader: Any, message: str) -> None:
    with pytest.raises(LoaderError, match=message):
        drop_batches(loader)


def test_bad_loaders_that_show_only_when_they_run() -> None:
    sources: list[Any] = [Unsized(0), DataLoader(Stream(0)), iter([])]
    for empty in sources:
        with pytest.raises(LoaderError, match="the loader is empty: it yielded no batch in epoch 0"):
            list(drop_batches(empty))
    batches = [1]
    loader = drop_batches(batches)
    batches.clear()
    with pytest.raises(LoaderError, match="the loader is empty"):
        iter(loader)
    with pytest.raises(LoaderError, match="Forgetful yields batches without asking its batch sampler"):
        list(drop_batches(Forgetful(Counting(3))))
    with pytest.raises(ConfigError, match="smd is a float"):
        drop_batches([1], 0.5)  # type: ignore[arg-type]


# Copies


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda loader: pickle.loads(pickle.dumps(loader))])
@pytest.mark.parametrize("workers", [0, 2])
def test_copies_go_on_by_themselves(clone: Callable[[SMDLoader], SMDLoader], workers: int) -> None:
    loader = dropping(Counting(20), batch_size=2, num_workers=workers, persistent_workers=workers > 0)
    list(loader)
    twin = clone(loader)
    assert values(twin) == values(loader) == expected(20, 2, 1)
    assert twin.stats() == loader.stats()
    assert repr(twin).startswith("SMDLoader(")
