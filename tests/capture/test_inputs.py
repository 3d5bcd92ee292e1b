"""Example inputs in their normal form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from e2pass.errors import InputError
from e2pass.inputs import Inputs


def test_the_three_forms() -> None:
    x, y = torch.ones(2, 3), torch.zeros(2)
    assert Inputs.of(x).args == (x,)
    assert Inputs.of([x, y]).args == (x, y)
    assert Inputs.of({"x": x, "n": 3}).kwargs == {"x": x, "n": 3}
    inputs = Inputs.of((None, {"a": [x]}, 2.5))
    assert inputs.tensors() == [x]
    assert inputs.batch_size == 2
    assert Inputs.of(inputs) is inputs


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (3, "type int are not understood"),
        (None, "type NoneType are not understood"),
        ((1, None), "hold no tensor"),
        ((), "hold no tensor"),
        (torch.tensor(1.0), "no dimensions"),
        (torch.ones(0, 3), "batch is empty"),
        ({1: torch.ones(2)}, "key 1 that is no string"),
        ({"x": [torch.ones(2), object()]}, r"keyword \['x'\]\[1\] is a object"),
        ((torch.ones(2), {3}), r"positional \[1\] is a set"),
    ],
)
def test_anything_else_is_one_clear_error(example: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Inputs.of(example)


def test_a_batch_must_hold_a_sample() -> None:
    with pytest.raises(InputError, match="batch of 0"):
        Inputs.of(torch.ones(2)).with_batch(0)


@given(have=st.integers(1, 7), want=st.integers(1, 20))
def test_with_batch_takes_samples_in_turn(have: int, want: int) -> None:
    x = torch.arange(have * 2.0).reshape(have, 2)
    table = torch.arange(9.0)
    resized = Inputs.of((x, {"y": x[:, 0], "table": table, "n": 5})).with_batch(want)
    assert resized.batch_size == want
    for row in range(want):
        assert torch.equal(resized.args[0][row], x[row % have])
        assert resized.args[1]["y"][row] == x[row % have, 0]
    assert torch.equal(resized.args[1]["table"], table)
    assert resized.args[1]["n"] == 5


def test_copies_share_no_memory_and_keep_what_needs_gradients() -> None:
    x = torch.ones(4, 2, requires_grad=True)
    for batch in (2, 4, 6):
        copied = Inputs.of(x).with_batch(batch).args[0]
        assert copied.is_leaf
        assert copied.requires_grad
        assert copied.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
