"""Outputs of any structure, taken apart and put together again."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import e2pass
from e2pass.backends.onnx_export import export_inference
from e2pass.capture.output import flatten, opened

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


@dataclass
class Answer:
    """What many models return: a dataclass without any registration."""

    logits: Tensor
    hidden: Any = None
    steps: int = 3


@dataclass(frozen=True, slots=True)
class Sealed:
    """Cannot be written to."""

    logits: Tensor
    kept: Any


class Pair(NamedTuple):
    """A named tuple."""

    logits: Tensor
    rest: dict[str, Any]


class Answering(nn.Module):
    """A residual block whose result is wrapped by ``wrap``."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], Any], *, without_gradients: bool = False) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        self.head = nn.Linear(4, 3)
        self.wrap, self.without_gradients = wrap, without_gradients

    def forward(self, x: Tensor) -> Any:
        if self.without_gradients:  # makes the graph one that only torch.export can have
            with torch.no_grad():
                x = x * 2
        x = x + self.block(x)
        return self.wrap(self.head(x), x)


WRAPS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "dataclass": lambda y, h: Answer(y, h),
    "in a dict": lambda y, h: {"a": [Answer(y, (h, None))], "n": 2},
    "frozen": lambda y, h: Sealed(y, {"h": [h, "text"]}),
    "nested": lambda y, h: Answer(y, Sealed(h, Answer(h * 2, steps=7))),
    "named tuple": lambda y, h: Pair(y, {"h": {"inner": h}}),
}


@pytest.mark.parametrize("without_gradients", [False, True])
@pytest.mark.parametrize("name", WRAPS)
def test_a_transformed_model_returns_the_classes_of_the_original(name: str, without_gradients: bool) -> None:
    model = Answering(WRAPS[name], without_gradients=without_gradients)
    x = torch.linspace(-1, 1, 24).reshape(6, 4)
    t = e2pass.transform(model, x, config="neutral")
    assert len(t.blocks) == 1
    ours, theirs = t.model(x), model(x)
    assert type(ours) is type(theirs)
    torch.testing.assert_close(*(torch.cat([v.flatten() for v in flatten(o)[0]]) for o in (ours, theirs)))
    assert re.sub(r"tensor\(.*?\)", "", repr(ours), flags=re.S) == re.sub(
        r"tensor\(.*?\)", "", repr(theirs), flags=re.S
    )
    proofs = t.verify()
    assert proofs, proofs
    flatten(ours)[0][0].sum().backward()
    flatten(theirs)[0][0].sum().backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(t.model.get_parameter(key).grad, parameter.grad)


def test_an_exported_dataclass_has_an_output_a_field(tmp_path: Path) -> None:
    model = Answering(WRAPS["dataclass"]).eval()
    x = torch.linspace(-1, 1, 24).reshape(6, 4)
    t = e2pass.transform(model, x, config="slu")
    path = tmp_path / "model.onnx"
    export_inference(t, x, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["logits", "hidden"]
    logits = t.model.eval()(x).logits.detach().numpy()
    assert session.run(None, {session.get_inputs()[0].name: x.numpy()})[0] == pytest.approx(logits, abs=1e-5)


def test_a_dataclass_is_opened_for_whoever_looks_for_tensors() -> None:
    x = torch.ones(2)
    assert opened([Answer(x, Sealed(x, 1)), 2]) == [{"logits": x, "hidden": {"logits": x, "kept": 1}, "steps": 3}, 2]
