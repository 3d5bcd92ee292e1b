"""The preset "neutral" changes nothing: outputs, gradients and buffer updates are the original's."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import e2pass
from e2pass.transformed import Transformed
from tests.zoo import ENTRIES, ZOO, Entry, ExampleInputs, call, tensors

RELATIVE = 2e-4  # of the largest entry; float32, sums in another order


@dataclass(frozen=True)
class Step:
    """Everything one step of a model leaves behind."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]


def image_of(batch: int) -> Tensor:
    return torch.randn(batch, 3, 32, 32)


SHIPPED = (
    Entry("resnet20", lambda: e2pass.models.resnet(20), lambda: image_of(6), 9, "the paper's network"),
    Entry("mobilenet_v2", lambda: e2pass.models.mobilenet_v2(), lambda: image_of(4), 10, "the paper's network"),
)


@functools.cache
def neutral(entry: Entry) -> tuple[nn.Module, ExampleInputs, dict[str, Tensor], Transformed]:
    """A model, its inputs, its state before and its neutral form, which the tests only use copies of."""
    model, inputs = entry.make()
    before = copy.deepcopy(model.state_dict())
    return model, inputs, before, e2pass.transform(model, inputs, config="neutral")


def one_step(model: nn.Module, inputs: ExampleInputs) -> Step:
    """Forward and backward of a fixed random functional of all outputs, with fixed random numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        outputs = tensors(call(model, inputs))
    generator = torch.Generator().manual_seed(5)
    differentiable = [t for t in outputs if t.requires_grad]
    torch.stack([(t * torch.randn(t.shape, generator=generator)).sum() for t in differentiable]).sum().backward()
    return Step(
        [t.detach() for t in outputs],
        {n: p.grad for n, p in model.named_parameters() if not n.startswith("e2_")},
        {n: b for n, b in model.named_buffers() if not n.startswith("e2_")},
    )


def assert_close(actual: Tensor | None, expected: Tensor | None, what: str) -> None:
    if expected is None or not bool(expected.any()):
        assert actual is None or float(actual.abs().max()) < 1e-6, f"{what} should be zero"
        return
    assert actual is not None, f"{what} is missing"
    assert actual.shape == expected.shape, what
    if not expected.is_floating_point():
        assert torch.equal(actual, expected), what
        return
    largest = float(expected.abs().max())
    bound = RELATIVE * max(largest, 1e-4)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=bound, msg=lambda m: f"{what}: {m}")


def assert_same_step(actual: Step, expected: Step) -> None:
    assert len(actual.outputs) == len(expected.outputs)
    for i, (a, b) in enumerate(zip(actual.outputs, expected.outputs, strict=True)):
        assert_close(a, b, f"output {i}")
    assert actual.gradients.keys() == expected.gradients.keys()
    largest = max((float(g.abs().max()) for g in expected.gradients.values() if g is not None), default=0.0)
    for name, gradient in expected.gradients.items():
        ours = actual.gradients[name]
        if gradient is not None and float(gradient.abs().max()) < 1e-5 * largest:  # exactly zero but for rounding
            assert ours is None or float(ours.abs().max()) < 1e-4 * largest, f"gradient of {name}"
            continue
        assert_close(ours, gradient, f"gradient of {name}")
    for name, buffer in expected.buffers.items():
        assert_close(actual.buffers[name], buffer, f"buffer {name}")


# Tests of one model run in one process, which transforms it once.
MODELS = [pytest.param(e, id=e.name, marks=pytest.mark.xdist_group(e.name)) for e in (*SHIPPED, *ENTRIES)]


@pytest.mark.parametrize("entry", MODELS)
def test_neutral_equals_the_original(entry: Entry) -> None:
    original, inputs, before, t = neutral(entry)
    report = t.verify()
    assert report, f"\n{report}"
    assert len(report.proofs) >= 5
    for training in (True, False):
        expected = one_step(copy.deepcopy(original).train(training), inputs)
        actual = one_step(copy.deepcopy(t.model).train(training), inputs)
        assert_same_step(actual, expected)
    after = original.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before), "the caller's model changed"
    assert all(p.grad is None for p in original.parameters())


@pytest.mark.parametrize("entry", MODELS)
def test_blocks_of_the_transformed_model(entry: Entry) -> None:
    _, _, _, t = neutral(entry)
    gated = [b for b in t.blocks if b.gated]
    assert len(gated) == len(t.blocks) == entry.blocks, entry.rule
    assert all(b.reason for b in t.blocks if not b.gated)
    expected = {"E2P203"} if not gated else set()
    assert {d.code for d in t.diagnostics.with_code("E2P203")} == expected
    assert len(list(t.diagnostics.with_code("E2P200"))) == len(gated)


@pytest.mark.parametrize("entry", MODELS)
def test_keys_of_the_original_survive(entry: Entry) -> None:
    original, _, _, t = neutral(entry)
    keys = list(original.state_dict())
    assert [k for k in t.model.state_dict() if not k.startswith("e2_")] == keys
    ours = [n for n, _ in t.model.named_parameters() if not n.startswith("e2_")]
    assert ours == [n for n, _ in original.named_parameters()]
    trained = copy.deepcopy(t.model)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.5)
    unwrapped = trained.source()
    fresh = copy.deepcopy(original)
    assert type(unwrapped) is type(fresh)
    assert list(unwrapped.state_dict()) == keys
    assert str(fresh.load_state_dict(unwrapped.state_dict())) == "<All keys matched successfully>"
    for name, parameter in fresh.named_parameters():
        assert torch.equal(parameter, trained.get_parameter(name)), name


def test_an_mlp_says_that_it_has_no_residual_block() -> None:
    _, _, _, t = neutral(ZOO["mlp"])
    (found,) = t.diagnostics.with_code("E2P203")
    assert "no residual block" in found.message
    assert t.blocks == []


def sgd(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3)  # type: ignore[arg-type]


def adamw(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [sgd, adamw])
def test_neutral_trains_like_the_original(make: Callable[[object], torch.optim.Optimizer]) -> None:
    original, inputs = ZOO["preact_resnet"].make()
    original.double()
    assert isinstance(inputs, Tensor)
    t = e2pass.transform(original, inputs.double(), config="neutral")
    runs = []
    for model in (original, t.model):
        generator = torch.Generator().manual_seed(1)
        optimizer = make([p for n, p in model.named_parameters() if not n.startswith("e2_")])
        losses = []
        for _ in range(6):
            x = torch.randn(inputs.shape, generator=generator, dtype=torch.float64)
            y = torch.randint(0, 10, (len(x),), generator=generator)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        runs.append(losses)
    assert runs[1] == pytest.approx(runs[0], rel=1e-9)
    assert runs[0][-1] != runs[0][0]


def test_frozen_parameters_stay_frozen() -> None:
    original, inputs = ZOO["preact_resnet"].make()
    frozen = [n for n, _ in original.named_parameters()][:6]
    for name in frozen:
        original.get_parameter(name).requires_grad_(False)
    t = e2pass.transform(original, inputs, config="neutral")
    actual, expected = one_step(t.model, inputs), one_step(copy.deepcopy(original), inputs)
    assert all(actual.gradients[n] is None for n in frozen)
    assert_same_step(actual, expected)


RESIZED = ["preact_resnet", "residual_mlp", "vit", "gpt2", "tuple_input"]


@pytest.mark.parametrize("entry", [m for m in MODELS if m.id in RESIZED])
@pytest.mark.parametrize("batch", [1, 2, 11])
def test_neutral_at_other_batch_sizes(entry: Entry, batch: int) -> None:
    model, inputs, _, t = neutral(entry)
    leaves = list(inputs.values()) if isinstance(inputs, dict) else inputs if isinstance(inputs, tuple) else [inputs]
    resized = [leaf[torch.arange(batch) % len(leaf)] for leaf in leaves]
    other: ExampleInputs = resized[0] if isinstance(inputs, Tensor) else tuple(resized)
    if isinstance(inputs, dict):
        other = dict(zip(inputs, resized, strict=True))
    assert_same_step(one_step(copy.deepcopy(t.model), other), one_step(copy.deepcopy(model), other))
