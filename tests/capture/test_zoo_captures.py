"""Every model of the zoo: the captured graphs against the model itself."""

from __future__ import annotations

import copy
import re
from functools import cache
from typing import Any

import pytest
import torch
from torch import fx, nn

from e2pass.capture import Capture, capture
from e2pass.capture.output import flatten
from e2pass.diagnostics import Diagnostics, Severity
from e2pass.inputs import Inputs
from tests.zoo import ZOO

NAMES = sorted(ZOO)
EXPORTED = {"vit", "gpt2", "bert"}


class Captured:
    """A model, what it was before, and its capture."""

    def __init__(self, name: str) -> None:
        self.model, example = ZOO[name].make()
        self.inputs = Inputs.of(example)
        self.before = snapshot(self.model)
        self.diagnostics = Diagnostics()
        self.rng = torch.get_rng_state()
        self.capture: Capture = capture(self.model, self.inputs, self.diagnostics)
        self.rng_after = torch.get_rng_state()
        self.after = snapshot(self.model)


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "modes": [module.training for module in model.modules()],
        "attributes": [sorted(module.__dict__) for module in model.modules()],
        "gradients": [parameter.grad for parameter in model.parameters()],
    }


@cache
def captured(name: str) -> Captured:
    return Captured(name)


def run_model(model: nn.Module, inputs: Inputs) -> list[Any]:
    return flatten(model(*inputs.args, **inputs.kwargs))[0]


def run_graph(result: Capture, inputs: Inputs, training: bool) -> list[Any]:
    graph = result.train if training else result.eval
    output = graph(*result.bind(inputs.args, inputs.kwargs))
    return flatten(result.rebuild(output, training))[0]


@pytest.mark.parametrize("name", NAMES)
def test_the_callers_model_and_random_state_come_out_unchanged(name: str) -> None:
    c = captured(name)
    before, after = c.before, c.after
    assert torch.equal(c.rng, c.rng_after)
    assert before["modes"] == after["modes"]
    assert before["attributes"] == after["attributes"]
    assert before["gradients"] == after["gradients"]
    assert list(before["state"]) == list(after["state"])
    assert all(torch.equal(before["state"][key], after["state"][key]) for key in before["state"])


@pytest.mark.parametrize("name", NAMES)
def test_names_order_and_sharing_are_the_models_own(name: str) -> None:
    c = captured(name)
    for graph in (c.capture.train, c.capture.eval):
        assert list(graph.state_dict()) == list(c.model.state_dict())
        ours = dict(graph.named_parameters(remove_duplicate=False))
        theirs = dict(c.model.named_parameters(remove_duplicate=False))
        assert list(ours) == list(theirs)
        assert all(ours[key] is theirs[key] for key in theirs)
        assert all(a is b for a, b in zip(graph.buffers(), c.model.buffers(), strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [1, 3, 5])
def test_evaluation_equals_the_model_at_other_batch_sizes(name: str, batch: int) -> None:
    c = captured(name)
    inputs = c.inputs.with_batch(batch)
    model = copy.deepcopy(c.model).eval()
    c.model.eval()
    with torch.no_grad():
        expected, got = run_model(model, inputs), run_graph(c.capture, inputs, training=False)
    c.model.train()
    for one, other in zip(expected, got, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_training_equals_the_model_in_outputs_gradients_and_buffers(name: str) -> None:
    c = captured(name)
    inputs = c.inputs.with_batch(5)
    reference = copy.deepcopy(c.model).train()
    kept = copy.deepcopy(c.model.state_dict())
    torch.manual_seed(1)
    expected = run_model(reference, inputs)
    sum(value.double().square().sum() for value in expected if value.requires_grad).backward()
    torch.manual_seed(1)
    got = run_graph(c.capture, inputs, training=True)
    sum(value.double().square().sum() for value in got if value.requires_grad).backward()
    try:
        for one, other in zip(expected, got, strict=True):
            torch.testing.assert_close(other, one, rtol=0, atol=0)
        for (key, one), other in zip(reference.named_parameters(), c.model.parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None), key
            if one.grad is not None and other.grad is not None:
                torch.testing.assert_close(other.grad, one.grad, msg=key)
        for one, other in zip(reference.buffers(), c.model.buffers(), strict=True):
            torch.testing.assert_close(other, one, rtol=0, atol=0)
    finally:
        c.model.load_state_dict(kept)
        c.model.zero_grad()


class _Shapes(fx.Interpreter):
    """Checks every recorded shape against a run on real tensors."""

    def __init__(self, module: fx.GraphModule, batch: int) -> None:
        super().__init__(module)
        self._batch = batch
        self.checked = 0

    def run_node(self, n: fx.Node) -> Any:
        real = super().run_node(n)
        recorded = n.meta["val"]
        for want, have in zip(flatten(real)[0], flatten(recorded)[0], strict=False):
            if isinstance(want, torch.Tensor):
                assert tuple(want.shape) == tuple(self._number(size) for size in have.shape), n.format_node()
                assert want.dtype == have.dtype, n.format_node()
                self.checked += 1
        return real

    def _number(self, size: int | torch.SymInt) -> int:
        if isinstance(size, int):
            return size
        expression = size.node.expr
        return int(expression.subs(dict.fromkeys(expression.free_symbols, self._batch)))


@pytest.mark.parametrize("name", NAMES)
def test_recorded_shapes_hold_for_another_batch_size(name: str) -> None:
    c = captured(name)
    assert c.capture.symbolic_batch
    tensors = c.capture.bind(*_arguments(c.inputs.with_batch(5)))
    checker = _Shapes(c.capture.eval, 5)
    c.model.eval()
    with torch.no_grad():
        checker.run(*tensors)
    c.model.train()
    assert checker.checked > len(tensors)


def _arguments(inputs: Inputs) -> tuple[Any, Any]:
    return inputs.args, inputs.kwargs


@pytest.mark.parametrize("name", NAMES)
def test_nodes_know_where_they_come_from(name: str) -> None:
    c = captured(name)
    paths = {path for path, _ in c.model.named_modules(remove_duplicate=False)}
    for node in c.capture.train.graph.nodes:
        assert node.meta["e2_path"] in paths, node
    lines = {node.meta["e2_stack"] for node in c.capture.train.graph.nodes if node.op.startswith("call")}
    assert all(re.fullmatch(r"\w+\.py:\d+", line) for line in lines if line)
    own_code = any(not type(m).__module__.startswith("torch.") for m in c.model.modules())
    assert bool(lines - {""}) == own_code  # a network of nothing but torch's modules has no line of its own


@pytest.mark.parametrize("name", NAMES)
def test_the_rung_is_the_best_one_and_the_reason_is_told(name: str) -> None:
    c = captured(name)
    wanted = "export" if name in EXPORTED else "symbolic_trace+leaves" if name == "untraceable" else "symbolic_trace"
    assert c.capture.rung == wanted
    assert [d.message for d in c.diagnostics.with_code("E2P100")] == [f"captured by {wanted}"]
    reasons = list(c.diagnostics.with_code("E2P101"))
    assert len(reasons) == ["symbolic_trace", "export", "symbolic_trace+leaves"].index(wanted)
    assert all(".py:" in reason.message for reason in reasons)
    warnings = {d.code for d in c.diagnostics.at_least(Severity.WARNING)}
    assert warnings == ({"E2P102"} if name == "untraceable" else set())


@pytest.mark.parametrize("name", NAMES)
def test_no_value_is_written_twice(name: str) -> None:
    for graph in (captured(name).capture.train, captured(name).capture.eval):
        for node in graph.graph.nodes:
            title = str(getattr(node.target, "_opname", getattr(node.target, "__name__", node.target)))
            writes = node.op in ("call_function", "call_method") and title.endswith("_") and not title.endswith("__")
            assert not writes or node.args[0].op == "get_attr", node.format_node()
            if node.op == "call_module":
                assert not getattr(graph.get_submodule(node.target), "inplace", False), node.format_node()
