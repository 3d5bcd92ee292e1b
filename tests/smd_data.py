"""Data for the tests of mini-batch dropping, importable by data loader workers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from e2pass.config import SMD
from e2pass.smd import SMDLoader, drop_batches


class Counting(Dataset[Tensor]):
    """The numbers 0..n-1; counts in shared memory, so over all processes, how often each was fetched."""

    def __init__(self, n: int, noise: bool = False) -> None:
        self.fetched = torch.zeros(n, dtype=torch.int64).share_memory_()
        self.noise = noise

    def __len__(self) -> int:
        return len(self.fetched)

    def __getitem__(self, index: int) -> Tensor:
        self.fetched[index] += 1
        value = torch.tensor(float(index))
        return value + 0.5 * torch.rand(()) if self.noise else value


class Stream(IterableDataset[Tensor]):
    """The numbers 0..n-1 as a stream, with or without a length."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(self.n))


class SizedStream(Stream):
    def __len__(self) -> int:
        return self.n


class Unsized:
    """An iterable of batches that knows no length, as record readers are."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.n))


def values(batches: Any) -> list[list[int]]:
    """Return batches of numbers as lists."""
    return [batch.long().tolist() for batch in batches]


def dropping(dataset: Any, p: float = 0.5, seed: int = 0, **settings: Any) -> SMDLoader:
    return drop_batches(DataLoader(dataset, **settings), SMD(p=p, seed=seed))
