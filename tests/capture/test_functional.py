"""In-place operations: rewritten with the same meaning, or left alone with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from e2pass.capture import Capture, capture
from e2pass.diagnostics import Diagnostics
from e2pass.inputs import Inputs

ROWS = torch.linspace(-3, 3, 24).reshape(6, 4)


class Body(nn.Module):
    """Applies a function of (linear output, the module's activation)."""

    def __init__(self, function: Callable[[Tensor], object], activation: nn.Module | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.activation = activation
        self.function = function

    def forward(self, x: Tensor) -> object:
        h = self.linear(x)
        return self.function(h) if self.activation is None else self.activation(h) + h * 2


def taken(model: nn.Module) -> tuple[Capture, Diagnostics]:
    diagnostics = Diagnostics()
    return capture(model, Inputs.of(ROWS), diagnostics), diagnostics


def agree(model: nn.Module, result: Capture) -> None:
    for training in (True, False):
        model.train(training)
        torch.manual_seed(5)
        expected = model(ROWS)
        torch.manual_seed(5)
        got = (result.train if training else result.eval)(ROWS)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "activation",
    [
        nn.ReLU(True),
        nn.ReLU6(True),
        nn.LeakyReLU(0.3, True),
        nn.ELU(0.7, True),
        nn.SELU(True),
        nn.CELU(1.3, True),
        nn.Hardtanh(-0.4, 0.6, inplace=True),
        nn.SiLU(True),
        nn.Mish(True),
        nn.Hardswish(True),
        nn.Hardsigmoid(True),
        nn.RReLU(0.1, 0.4, True),
        nn.Threshold(0.2, -1.0, True),
        nn.Dropout(0.4, True),
    ],
    ids=lambda module: type(module).__name__,
)
def test_in_place_modules_read_later_are_rewired(activation: nn.Module) -> None:
    model = Body(lambda h: h, activation)
    result, diagnostics = taken(model)
    assert result.rung == "symbolic_trace"
    assert not result.train.graph.find_nodes(op="call_module", target="activation")
    assert activation.inplace
    assert not list(diagnostics.with_code("E2P120"))
    agree(model, result)


def test_a_module_that_ignores_its_flag_stays_a_module() -> None:
    model = Body(lambda h: h, nn.AlphaDropout(0.4, inplace=True))
    result, _ = taken(model)
    assert result.train.graph.find_nodes(op="call_module", target="activation")
    agree(model, result)


def iadd(h: Tensor) -> Tensor:
    old = h
    h += 1
    return h * old


def twice(h: Tensor) -> Tensor:
    g = functional.relu(h, inplace=True)
    g.mul_(3)
    return h + g


def scaled(h: Tensor) -> Tensor:
    h *= h.sigmoid()
    return h + 1


CASES: list[Callable[[Tensor], object]] = [
    iadd,
    twice,
    lambda h: (torch.relu_(h), h)[1],
    lambda h: functional.leaky_relu(h, 0.2, True) + h,
    lambda h: functional.hardtanh_(h, -0.5, 0.5) * h,
    lambda h: h.clamp_(min=0).add_(h),
    lambda h: functional.dropout(h, 0.5, True, True) - h,
    scaled,
    lambda h: h.flatten(1).relu_(),
    lambda h: h.sub_(1).exp_().neg_(),
]


@pytest.mark.parametrize("function", CASES)
def test_in_place_functions_and_methods_are_rewritten(function: Callable[[Tensor], object]) -> None:
    model = Body(function)
    result, diagnostics = taken(model)
    assert result.rung == "symbolic_trace"
    for node in result.train.graph.nodes:
        title = str(getattr(node.target, "__name__", node.target))
        assert not (title.endswith("_") and not title.endswith("__")), node.format_node()
        assert not title.startswith("i") or title == "input", node.format_node()
        assert not node.kwargs.get("inplace"), node.format_node()
    assert not list(diagnostics.with_code("E2P120"))
    agree(model, result)


def test_in_place_arithmetic_keeps_the_dtype() -> None:
    model = Body(lambda h: (h.half().add_(torch.ones(4)), 0)[0])
    result, _ = taken(model)
    assert result.train(ROWS).dtype == torch.float16
    agree(model, result)


def part(h: Tensor) -> Tensor:
    h[:, 0].add_(1)
    return h * 2


def reshaped(h: Tensor) -> Tensor:
    h.view(-1, 2, 2).relu_()
    return h * 2


def in_slice(h: Tensor) -> Tensor:
    left = h.narrow(1, 0, 2)
    left.zero_()
    return h + left.sum()


@pytest.mark.parametrize("function", [part, reshaped, in_slice])
def test_a_write_through_a_view_that_is_read_is_left_alone(function: Callable[[Tensor], Tensor]) -> None:
    model = Body(function)
    result, diagnostics = taken(model)
    assert len(list(diagnostics.with_code("E2P120"))) == 1
    agree(model, result)


def test_a_write_into_the_input_is_left_alone_and_reported() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x.add_(1) * 2

    result, diagnostics = taken(Writes())
    assert [d.node for d in diagnostics.with_code("E2P120")] == ["add_"]
    mine = ROWS.clone()
    torch.testing.assert_close(result.train(mine), (ROWS + 1) * 2)
    torch.testing.assert_close(mine, ROWS + 1)
    torch.testing.assert_close(ROWS, torch.linspace(-3, 3, 24).reshape(6, 4))  # the example is the caller's


def test_exported_graphs_are_rewritten_too() -> None:
    class Exported(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Any:
            if x.shape[1] != 4:
                raise ValueError("four features")
            h = self.norm(self.linear(x))
            g = functional.relu_(h)
            h += 1
            return h * g

    model = Exported()
    result, diagnostics = taken(model)
    assert result.rung == "export"
    targets = {str(node.target) for node in result.train.graph.nodes}
    assert {"aten.relu.default", "aten.add.Tensor"} <= targets
    assert "aten.relu_.default" not in targets
    counters = [n for n in result.train.graph.nodes if str(n.target) == "aten.add_.Tensor"]
    assert [str(n.args[0]) for n in counters] == ["norm_num_batches_tracked"]  # an update that is meant to last
    assert not list(diagnostics.with_code("E2P120"))
    model.eval()
    torch.testing.assert_close(result.rebuild(result.eval(ROWS), False), model(ROWS), rtol=0, atol=0)
