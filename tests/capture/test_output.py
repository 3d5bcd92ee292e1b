"""Outputs of any structure, taken apart and put together again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from e2pass.capture.output import flatten

_LEAVES = st.one_of(st.integers(0, 9).map(lambda i: torch.full((2,), i)), st.none(), st.integers(), st.text(max_size=3))
_TREES = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple), st.dictionaries(st.text(max_size=2), inner)
    ),
    max_leaves=8,
)


class Bag:
    """A class that pytree does not know."""

    def __init__(self, first: Any, again: Any) -> None:
        self.layers = [{"key": first}, again]
        self.name = "bag"


@given(_TREES)
def test_a_structure_comes_back_with_other_tensors(tree: Any) -> None:
    values, form = flatten(tree)
    doubled = form.rebuild([value * 2 for value in values])
    expected = pytree.tree_map(lambda leaf: leaf * 2 if isinstance(leaf, torch.Tensor) else leaf, tree)
    ours, ours_spec = pytree.tree_flatten(doubled)
    theirs, theirs_spec = pytree.tree_flatten(expected)
    assert ours_spec == theirs_spec
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_objects_of_unknown_classes_are_rebuilt_around_new_tensors() -> None:
    x, y = torch.ones(2), torch.zeros(3)
    values, form = flatten({"x": x, "bag": Bag(y, x)})
    assert [value is known for value, known in zip(values, (x, y), strict=True)] == [True, True]
    rebuilt = form.rebuild([x + 1, y + 1])["bag"]
    assert rebuilt.name == "bag"
    assert torch.equal(rebuilt.layers[0]["key"], y + 1)
    assert torch.equal(rebuilt.layers[1], x + 1)


def test_what_cannot_be_taken_apart_is_named() -> None:
    with pytest.raises(TypeError, match="returns a Bag, which cannot be taken apart"):
        flatten(Bag(lambda: 0, None))
