"""The sequence of SMD's decisions: which steps of which epoch are dropped."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from hashlib import blake2b

from e2pass.errors import ConfigError


class Decision(Enum):
    """What happens to one nominal step.

    ``HOLD`` is a drop while nothing of the epoch has been kept yet: whoever draws remembers this batch instead of the
    one remembered before, and runs it if the epoch ends without any kept batch.
    """

    KEEP = "keep"
    DROP = "drop"
    HOLD = "hold"


@dataclass(frozen=True)
class DropSchedule:
    """The seeded sequence of SMD's decisions, addressed by epoch and step.

    Every random number is a hash of ``(seed, epoch, step)``. So the decisions are the same on every rank, machine and
    torch version and for any number of workers, any epoch can be replayed from any position, and drawing them
    disturbs no other random generator.

    **Never an empty epoch.** An epoch of known length ``n`` is drawn as ``n`` independent coins *under the condition
    that at least one of them says keep*. The coins' own bias ``q`` is a little below ``1 - p``, chosen so that the
    probability of each batch to be kept is still exactly ``1 - p``: ``q / (1 - (1 - q)**n) = 1 - p``. From a few
    dozen batches on, ``q`` is ``1 - p``. Where ``n * (1 - p) <= 1`` no such ``q`` exists, as ``n * (1 - p)`` batches
    are expected of an epoch that must run at least one: then exactly one batch runs, each with probability ``1 / n``,
    the nearest possible.

    An epoch of unknown length is drawn with independent coins of bias ``1 - p``. If it ends and all were dropped, one
    of its batches, chosen uniformly (reservoir sampling), is run at its end; the share of each batch is then
    ``1 - p + p**n / n``, which tends to ``1 - p`` as epochs grow.

    Attributes:
        p: Probability that a batch is dropped, ``0 <= p < 1``.
        seed: Seed of the sequence, ``>= 0``.

    Raises:
        ConfigError: If ``p`` or ``seed`` is out of range.
    """

    p: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.p < 1.0:
            raise ConfigError(f"the probability of dropping a batch is {self.p!r}; it must be at least 0 and below 1")
        if self.seed < 0:
            raise ConfigError(f"the seed of the drop sequence is {self.seed!r}; it must be 0 or more")

    def epoch(self, epoch: int, length: int | None = None) -> EpochDecisions:
        """Return the decisions of one epoch, from its first step on.

        Args:
            epoch: Number of the epoch, from 0.
            length: Nominal number of batches in it; None if that is not known.
        """
        return EpochDecisions(self, epoch, length)

    def keeps(self, epoch: int, length: int) -> Iterator[bool]:
        """Iterate over the ``length`` steps of an epoch: True where the batch is kept."""
        decisions = self.epoch(epoch, length)
        return (decisions.draw() is Decision.KEEP for _ in range(length))

    def count(self, epoch: int, length: int) -> int:
        """Return how many of the ``length`` batches of an epoch are kept; at least 1 unless ``length`` is 0."""
        return _count(self, epoch, length)

    def uniform(self, epoch: int, step: int, purpose: str = "drop") -> float:
        """Return the number in [0, 1) that decides about one step."""
        digest = blake2b(f"{purpose}/{self.seed}/{epoch}/{step}".encode(), digest_size=8).digest()
        return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


class EpochDecisions:
    """The decisions of one epoch, drawn one after the other."""

    def __init__(self, schedule: DropSchedule, epoch: int, length: int | None) -> None:
        self.step = 0
        self.any_kept = False
        self._schedule = schedule
        self._epoch = epoch
        self._length = length
        self._bias = 1.0 - schedule.p if length is None else coin_bias(schedule.p, length)

    def draw(self) -> Decision:
        """Decide about the next step."""
        step, self.step = self.step, self.step + 1
        if self._schedule.uniform(self._epoch, step) < self._keep_probability(step):
            self.any_kept = True
            return Decision.KEEP
        if self.any_kept:
            return Decision.DROP
        # Replacing with probability 1/(step+1) leaves every batch so far equally likely to be the one that is held.
        return Decision.HOLD if self._schedule.uniform(self._epoch, step, "hold") * (step + 1) < 1.0 else Decision.DROP

    def _keep_probability(self, step: int) -> float:
        if self._length is None or self.any_kept or step >= self._length:
            return self._bias
        return first_keep_probability(self._bias, self._length - step)


def first_keep_probability(bias: float, remaining: int) -> float:
    """Return the probability that the next coin says keep, given that one of the ``remaining`` coins does.

    Args:
        bias: Probability of keep of each coin by itself; 0 stands for the limit, exactly one keep among all.
        remaining: Number of coins still to be drawn, the next one included.
    """
    if remaining == 1 or bias == 1.0:
        return 1.0
    return 1.0 / remaining if bias == 0.0 else bias / _some_keep(bias, remaining)


@lru_cache(maxsize=256)  # len() of a loader is often asked for at every step
def _count(schedule: DropSchedule, epoch: int, length: int) -> int:
    return sum(schedule.keeps(epoch, length))


@lru_cache(maxsize=256)
def coin_bias(p: float, length: int) -> float:
    """Return ``q`` with ``q / (1 - (1 - q)**length) = 1 - p``, or 0.0 where there is none (see DropSchedule)."""
    share = 1.0 - p
    if length * share <= 1.0:
        return 0.0
    low, high = 0.0, share
    while low < (middle := 0.5 * (low + high)) < high:
        # q - share * (1 - (1 - q)^n) is convex with roots 0 and q, so its sign tells the side of the second root.
        low, high = (middle, high) if middle < share * _some_keep(middle, length) else (low, middle)
    return high


def _some_keep(bias: float, coins: int) -> float:
    """Return ``1 - (1 - bias)**coins`` without losing the digits of a small bias."""
    return -math.expm1(coins * math.log1p(-bias)) if bias < 1.0 else 1.0
