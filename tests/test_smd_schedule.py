"""The drop sequence by itself, against closed forms and exact enumeration."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from e2pass.errors import ConfigError
from e2pass.smd.schedule import Decision, DropSchedule, coin_bias, first_keep_probability

drop_p = st.floats(0.0, 0.95)


def exact_shares(p: float, length: int) -> list[float]:
    """Enumerate the two states of an epoch, "nothing kept yet" and "something kept", step by step."""
    bias, nothing, shares = coin_bias(p, length), 1.0, []
    for step in range(length):
        first = first_keep_probability(bias, length - step)
        shares.append(nothing * first + (1 - nothing) * bias)
        nothing *= 1 - first
    assert nothing == 0.0  # an epoch is never empty
    return shares


@given(p=drop_p, length=st.integers(1, 400))
def test_each_batch_is_kept_with_probability_one_minus_p(p: float, length: int) -> None:
    expected = max(1 - p, 1 / length)  # fewer than one batch an epoch is not possible
    assert exact_shares(p, length) == pytest.approx([expected] * length, abs=1e-9)


def test_bias_solves_the_quadratic_of_three_batches() -> None:
    # q / (1 - (1-q)^3) = 1/2 is q^2 - 3q + 1 = 0.
    assert coin_bias(0.5, 3) == pytest.approx((3 - math.sqrt(5)) / 2, abs=1e-15)


@given(p=drop_p)
def test_long_epochs_are_plain_coins(p: float) -> None:
    assert coin_bias(p, 10_000) == pytest.approx(1 - p, abs=1e-12)


@given(p=st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.75]), length=st.integers(4, 12), seed=st.integers(0, 2**70))
def test_drawn_shares_tend_to_one_minus_p(p: float, length: int, seed: int) -> None:
    epochs, schedule = 600, DropSchedule(p, seed)
    kept = Counter(step for e in range(epochs) for step, keep in enumerate(schedule.keeps(e, length)) if keep)
    five_sigma = 5 * math.sqrt(p * (1 - p) / epochs)
    assert all(abs(kept[step] / epochs - (1 - p)) <= five_sigma for step in range(length))


def test_two_epochs_show_a_sample_none_one_or_two_times_as_the_paper_says() -> None:
    schedule, pairs, length = DropSchedule(0.5), 200, 100
    seen = Counter(
        first + second
        for pair in range(pairs)
        for first, second in zip(schedule.keeps(2 * pair, length), schedule.keeps(2 * pair + 1, length), strict=True)
    )
    shares = [seen[times] / (pairs * length) for times in range(3)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.02)


@given(p=drop_p, seed=st.integers(0, 1000), epoch=st.integers(0, 10**6), length=st.integers(1, 30))
def test_no_epoch_is_empty(p: float, seed: int, epoch: int, length: int) -> None:
    assert 1 <= DropSchedule(p, seed).count(epoch, length) <= length


@given(seed=st.integers(0, 1000), epoch=st.integers(0, 1000))
def test_decisions_are_a_function_of_seed_epoch_and_step(seed: int, epoch: int) -> None:
    schedule, again = DropSchedule(0.5, seed), DropSchedule(0.5, seed)
    list(again.keeps(epoch + 1, 64))  # what was drawn before does not matter
    assert list(schedule.keeps(epoch, 64)) == list(again.keeps(epoch, 64))
    assert list(schedule.keeps(epoch, 64)) != list(schedule.keeps(epoch + 1, 64))
    assert list(schedule.keeps(epoch, 64)) != list(DropSchedule(0.5, seed + 1).keeps(epoch, 64))


def test_the_sequence_is_the_same_on_every_machine_and_in_every_version() -> None:
    # Pinned: a change here breaks every saved run.
    pattern = "".join("K" if keep else "." for keep in DropSchedule(0.5, seed=0).keeps(epoch=0, length=40))
    assert pattern == "..K.K.KKKK....KK..K.KK.KK.KK.....K......"


def test_the_held_batch_of_an_epoch_without_keeps_is_uniform() -> None:
    held: Counter[int] = Counter()
    schedule = DropSchedule(0.7)
    for epoch in range(20_000):
        decisions = schedule.epoch(epoch)
        drawn = [decisions.draw() for _ in range(3)]
        if Decision.KEEP not in drawn:
            held[max(step for step, decision in enumerate(drawn) if decision is Decision.HOLD)] += 1
    total = sum(held.values())
    assert total / 20_000 == pytest.approx(0.7**3, abs=0.02)
    assert [held[step] / total for step in range(3)] == pytest.approx([1 / 3] * 3, abs=0.03)


@pytest.mark.parametrize(("p", "seed"), [(1.0, 0), (-0.1, 0), (float("nan"), 0), (0.5, -1)])
def test_out_of_range(p: float, seed: int) -> None:
    with pytest.raises(ConfigError, match=r"must be .* (below 1|or more)"):
        DropSchedule(p, seed)
