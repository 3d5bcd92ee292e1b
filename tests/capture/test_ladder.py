"""Which way of capturing is taken, what the diagnostics say, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from e2pass.capture import Capture, capture
from e2pass.diagnostics import Diagnostics
from e2pass.errors import CaptureError, InputError
from e2pass.inputs import Inputs
from tests.capture.models import (
    Aliased,
    Around,
    Autocast,
    BatchBranch,
    CustomGradient,
    DataDependent,
    DirtyGradient,
    FreshNoise,
    Modal,
    Nested,
    NoGrad,
)

ROWS = torch.linspace(-1, 1, 24).reshape(6, 4)
IMAGES = torch.linspace(-1, 1, 6 * 3 * 64).reshape(6, 3, 8, 8)


def taken(model: nn.Module, example: Any) -> tuple[Capture, Diagnostics]:
    diagnostics = Diagnostics()
    return capture(model, Inputs.of(example), diagnostics), diagnostics


def equal_in_training(model: nn.Module, result: Capture, inputs: Inputs) -> bool:
    """Compare two steps of the graph with two of a copy of the model, from the same state and seed."""
    reference = copy.deepcopy(model).train()
    model.train()
    for _ in range(2):
        torch.manual_seed(3)
        expected = reference(*inputs.args, **inputs.kwargs)
        torch.manual_seed(3)
        output = result.rebuild(result.train(*result.bind(inputs.args, inputs.kwargs)), True)
        torch.testing.assert_close(output, expected, rtol=0, atol=0)
    return all(torch.equal(a, b) for a, b in zip(reference.buffers(), model.buffers(), strict=True))


def assert_same_gradients(model: nn.Module, result: Capture) -> None:
    result.train(*result.bind((ROWS,), {})).sum().backward()
    ours = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    model(ROWS).sum().backward()
    for one, other in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(one, other.grad)


def test_both_modes_are_traced_when_they_differ() -> None:
    model = Modal()
    result, _ = taken(model, IMAGES)
    assert result.rung == "symbolic_trace"
    assert result.train is not result.eval
    assert len(result.train.graph.nodes) == len(result.eval.graph.nodes) + 1  # the factor of two
    assert equal_in_training(model, result, Inputs.of(IMAGES))
    model.eval()
    torch.testing.assert_close(result.eval(*result.bind((IMAGES,), {})), model(IMAGES), rtol=0, atol=0)


def test_a_batch_of_one_is_captured_with_a_symbolic_batch() -> None:
    model = Modal()
    result, _ = taken(model, IMAGES[:1])
    assert result.symbolic_batch
    model.eval()
    torch.testing.assert_close(result.eval(IMAGES), model(IMAGES), rtol=0, atol=0)


def test_arguments_not_passed_take_their_defaults_and_constants_stay() -> None:
    model = Modal().eval()
    result, _ = taken(model, {"x": IMAGES, "flag": True})
    values = result.bind((IMAGES, True), {"scale": None})
    assert [value is IMAGES for value in values] == [True]
    torch.testing.assert_close(result.eval(*values), model(IMAGES, flag=True), rtol=0, atol=0)
    with pytest.raises(InputError, match=r"captured with \['flag'\] = True.*passes None"):
        result.bind((IMAGES,), {})
    with pytest.raises(InputError, match="without \\['scale'\\]"):
        result.bind((IMAGES, True), {"scale": IMAGES})
    with pytest.raises(InputError, match="with a tensor for \\['x'\\]; this call passes None"):
        result.bind((None, True), {})
    with pytest.raises(InputError, match=r"do not fit Modal.forward\(x, flag, scale\)"):
        result.bind((), {"image": IMAGES})


def test_nested_keyword_arguments_and_outputs() -> None:
    model = Nested().eval()
    example = {"x": ROWS, "q": [ROWS * 2], "extra": (None, {"k": ROWS * 3}), "mask": ROWS > 0}
    result, _ = taken(model, example)
    assert [node.name for node in result.train.graph.find_nodes(op="placeholder")] == [
        "x",
        "mask",
        "extra_1_k",
        "kw_q_0",
    ]
    shuffled = dict(reversed(example.items()))
    output = result.rebuild(result.eval(*result.bind((), shuffled)))
    expected = model(**example)
    assert list(output) == ["h", "extras"]
    assert output["extras"][1:] == [None, "a"]
    torch.testing.assert_close(output["h"], expected["h"], rtol=0, atol=0)
    torch.testing.assert_close(output["extras"][0], expected["extras"][0], rtol=0, atol=0)


def test_aliases_keep_their_keys_and_order() -> None:
    model = Aliased()
    result, _ = taken(model, ROWS)
    assert list(result.train.state_dict()) == list(model.state_dict())
    assert "alias.weight" in result.train.state_dict()
    assert result.train.get_parameter("tied") is model.late.weight
    assert not hasattr(model, "last_input")
    assert equal_in_training(model, result, Inputs.of(ROWS))


def test_regions_without_gradients_need_export() -> None:
    model = NoGrad()
    result, diagnostics = taken(model, ROWS)
    assert result.rung == "export"
    assert all(name.startswith("e2_const_") for name in result.constants)
    assert any("gradients switched off" in d.message for d in diagnostics.with_code("E2P101"))
    assert equal_in_training(model, result, Inputs.of(ROWS))
    output, rows = result.rebuild(result.train(*result.bind((ROWS[:5],), {})), True)
    assert rows == 5
    output.sum().backward()
    assert model.frozen.weight.grad is None
    assert model.head.weight.grad is not None


@pytest.mark.parametrize("inner", [DataDependent, Autocast, DirtyGradient])
def test_what_cannot_be_traced_becomes_a_leaf(inner: type[nn.Module]) -> None:
    model = Around(inner())
    result, diagnostics = taken(model, ROWS)
    assert result.rung == "symbolic_trace+leaves"
    assert result.leaves == ("inner",)
    assert [d.node for d in diagnostics.with_code("E2P102")] == ["inner"]
    assert result.symbolic_batch
    leaf = next(iter(result.train.graph.find_nodes(op="call_module", target="inner")))
    assert str(leaf.meta["val"].shape[0]) == str(next(iter(result.train.graph.nodes)).meta["val"].shape[0])
    assert equal_in_training(model, result, Inputs.of(ROWS))
    assert_same_gradients(model, result)


def test_an_autograd_function_is_one_operation_with_its_own_gradient() -> None:
    model = Around(CustomGradient())
    result, _ = taken(model, ROWS)
    assert result.rung == "symbolic_trace"
    assert "Straight" in {getattr(node.target, "__name__", "") for node in result.train.graph.nodes}
    assert equal_in_training(model, result, Inputs.of(ROWS))
    assert_same_gradients(model, result)


def test_the_parent_becomes_the_leaf_when_leaving_out_the_child_is_not_enough() -> None:
    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.child = DataDependent()

        def forward(self, x: Tensor) -> Any:
            h = self.child(x)
            return h if h.sum() > 0 else -h

    result, _ = taken(Around(Parent()), ROWS)
    assert result.leaves == ("inner",)


def test_random_numbers_are_not_frozen_into_the_graph() -> None:
    model = FreshNoise()
    result, _ = taken(model, ROWS)
    assert result.rung == "symbolic_trace"
    assert equal_in_training(model, result, Inputs.of(ROWS))
    first, second = (result.train(*result.bind((ROWS,), {}))[0] for _ in range(2))
    assert not torch.equal(first, second)


def test_a_branch_on_the_batch_size_is_guarded_at_every_call() -> None:
    model = BatchBranch().eval()
    result, diagnostics = taken(model, ROWS)
    assert [d.message for d in diagnostics.with_code("E2P111")] == ["the graph does not hold for batch sizes such as 2"]
    for batch in (3, 4, 50):
        inputs = torch.ones(batch, 4)
        torch.testing.assert_close(result.rebuild(result.eval(*result.bind((inputs,), {}))), model(inputs))
    for batch in (1, 2):
        with pytest.raises(InputError, match=f"does not hold for a batch of {batch}"):
            result.bind((torch.ones(batch, 4),), {})


def test_an_exported_graph_refuses_other_sizes() -> None:
    result, _ = taken(BatchBranch(), torch.ones(6, 5, 4))
    with pytest.raises(InputError, match=r"input 'x' of BatchBranch has shape \(6, 7, 4\).*\(any, 5, 4\)"):
        result.bind((torch.ones(6, 7, 4),), {})


def test_a_model_that_is_one_untraceable_line_is_refused_with_that_line() -> None:
    with pytest.raises(CaptureError, match=r"DataDependent cannot be captured: .*models\.py:\d+ \(if x\.sum\(\) > 0:"):
        taken(DataDependent(), ROWS)


def test_blocks_inside_torch_transformers_are_visible() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    result, _ = taken(nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)), torch.ones(3, 5, 8))
    assert result.rung == "export"
    additions = [n for n in result.train.graph.nodes if n.target is torch.ops.aten.add.Tensor]
    assert len(additions) == 4


def test_capturing_works_without_gradients_and_in_inference_mode() -> None:
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            result, _ = taken(Modal(), torch.ones(3, 3, 8, 8))
        assert result.rung == "symbolic_trace"


def test_hooks_of_the_root_are_part_of_the_graph() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_forward_hook(lambda module, args, output: output * 3)
    result, _ = taken(model, ROWS)
    torch.testing.assert_close(result.train(ROWS), model(ROWS))


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (
            nn.Linear(4, 4),
            torch.ones(2, 5),
            r"Linear does not run on the example inputs: RuntimeError: .*\(2x5 and 4x4\)",
        ),
        (lambda x: x, ROWS, "the model is a function; an instance of torch.nn.Module is needed"),
        (nn.LazyLinear(4), ROWS, "lazy parameters"),
        (Modal(), {"image": IMAGES}, "do not fit Modal.forward"),
    ],
)
def test_bad_input_is_one_clear_error(model: Any, example: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        taken(model, example)
    assert "\n" not in str(caught.value)


def test_an_exported_graph_says_which_modules_it_cannot_keep_in_evaluation() -> None:
    model = NoGrad()
    model.head = nn.Sequential(nn.Dropout(), model.head)  # type: ignore[assignment]
    assert not list(taken(model, ROWS)[1].with_code("E2P103"))
    model.head[0].eval()  # type: ignore[index]
    result, diagnostics = taken(model, ROWS)
    assert result.rung == "export"
    assert [d.node for d in diagnostics.with_code("E2P103")] == ["head.0"]
    assert not list(taken(model.eval(), ROWS)[1].with_code("E2P103"))


def test_a_gradient_that_is_no_number_is_equal_to_itself() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.shift = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.scale).square().sqrt() + x * self.shift  # the slope of the root is infinite at zero

    result, _ = taken(Root(), ROWS)
    assert result.rung == "symbolic_trace"


def test_a_norm_with_a_cumulative_average_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None))
    with pytest.raises(CaptureError, match="cannot be captured: norm 1 has momentum=None"):
        taken(model, IMAGES)
