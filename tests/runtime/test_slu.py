"""SLU in whole models: real skipping, closed and random gates, the controller, batches of any size."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import e2pass
from e2pass.transformed import Transformed
from tests.zoo import ZOO, call, conv_residual, image_net, tensors, vector_net, vector_residual


def config(gate: str = "learned", skip: float = 0.4, **values: object) -> e2pass.Config:
    return e2pass.Config(smd=None, slu=e2pass.SLU(gate=gate, skip=skip, **values), psg=None, bits=None)


def residual_mlp(n: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return vector_net(*(vector_residual(16) for _ in range(n)))


def train(t: Transformed, steps: int, batch: int = 16, seed: int = 0) -> list[float]:
    """Train on random vectors; returns each step's executed share of the gated energy."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(t.param_groups(lr=0.02), momentum=0.9)
    slu, executed = t.model.e2_slu, []
    assert slu is not None
    for _ in range(steps):
        x = torch.randn(batch, 12, generator=generator)
        y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
        slu.reset_statistics()
        optimizer.zero_grad()
        nn.functional.cross_entropy(t.model(x), y).backward()
        optimizer.step()
        ratio = slu.skip_ratio()
        assert ratio is not None
        executed.append(1.0 - ratio)
    return executed


@pytest.mark.parametrize("name", ["preact_resnet", "residual_mlp", "tuple_input", "vit", "gpt2", "bert"])
def test_skipping_for_real_equals_multiplying_by_zero(name: str) -> None:
    model, inputs = ZOO[name].make()
    t = e2pass.transform(model, inputs, config=config())
    with torch.no_grad():
        for _ in range(3):
            call(t.model, inputs)
    t.model.eval()
    args = inputs if isinstance(inputs, tuple) else () if isinstance(inputs, dict) else (inputs,)
    kwargs = inputs if isinstance(inputs, dict) else {}
    for price in (-0.7, 0.0, 0.7):  # from mostly open to mostly closed
        assert t.model.e2_slu is not None
        t.model.e2_slu.price.fill_(price)
        with torch.no_grad():
            gathered = tensors(t.model.execute(args, kwargs, masked=False))
            masked = tensors(t.model.execute(args, kwargs, masked=True))
        for a, b in zip(gathered, masked, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_skipping_for_real_has_the_gradients_of_multiplying_by_zero() -> None:
    t = e2pass.transform(residual_mlp(), torch.randn(8, 12), config=config(inject=False))
    train(t, 3)
    x = torch.randn(32, 12)
    found = []
    for masked in (False, True):
        twin = copy.deepcopy(t.model)
        twin.execute((x,), {}, masked=masked).square().sum().backward()
        found.append({n: p.grad for n, p in twin.named_parameters() if not n.startswith("e2_")})
    share = t.model.e2_slu.skip_ratio()  # type: ignore[union-attr]
    assert share is not None
    assert 0 < share < 1
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-3, atol=1e-4, msg=name)


def test_closed_gates_leave_the_skip_path() -> None:
    model = residual_mlp(3)
    x = torch.randn(8, 12)
    t = e2pass.transform(model, x, config=config("closed"))
    for training in (True, False):
        t.model.train(training)
        torch.testing.assert_close(t.model(x), model[4](model[0](x)))  # type: ignore[index]
    t.model.train()
    t.model(x).sum().backward()
    for name, parameter in t.model.named_parameters():
        if name.startswith("e2_"):
            continue
        assert (parameter.grad is None) == (not name.startswith(("0.", "4."))), name
    assert t.stats()["slu"]["skip_ratio"] == pytest.approx(1.0)


def test_closed_gates_leave_the_batch_norms_inside_alone() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 3, 8, 8)
    t = e2pass.transform(image_net(conv_residual(8)), x, config=config("closed"))
    before = copy.deepcopy(t.model.state_dict())
    t.model(x).sum().backward()
    changed = {k for k, v in t.model.state_dict().items() if isinstance(v, Tensor) and not torch.equal(v, before[k])}
    assert not any(k.startswith("1.") for k in changed)
    assert any(k.startswith("0.") and "running" in k for k in changed)


def test_open_gates_equal_the_original() -> None:
    model, x = residual_mlp(), torch.randn(8, 12)
    t = e2pass.transform(model, x, config=config("open"))
    torch.testing.assert_close(t.model(x), model(x))
    assert t.stats()["slu"]["skip_ratio"] == 0.0


@pytest.mark.parametrize("skip", [0.2, 0.5])
def test_random_gates_keep_the_rate(skip: float) -> None:
    t = e2pass.transform(residual_mlp(), torch.randn(8, 12), config=config("random", skip))
    for _ in range(20):
        t.model(torch.randn(100, 12))
    blocks = t.stats()["slu"]["blocks"]
    assert len(blocks) == 4
    for block in blocks.values():  # five standard deviations of 2000 throws
        assert abs(block["skip_ratio"] - skip) < 5 * (skip * (1 - skip) / 2000) ** 0.5


def test_random_gates_in_evaluation_have_the_expected_value() -> None:
    model = residual_mlp(1)
    t = e2pass.transform(model, torch.randn(8, 12), config=config("random", 0.25))
    t.model.eval()
    x = torch.randn(5, 12)
    stem = model[0](x)  # type: ignore[index]
    expected = model[2](stem + 0.75 * model[1].body(stem))  # type: ignore[index]
    torch.testing.assert_close(t.model(x), expected)
    torch.testing.assert_close(t.model(x), t.model(x))


def test_random_gates_are_reproducible_and_leave_the_global_generator_alone() -> None:
    x, runs = torch.randn(8, 12), []
    for _ in range(2):
        t = e2pass.transform(residual_mlp(), x, config=config("random", 0.5, seed=3))
        state = torch.get_rng_state()
        runs.append([t.model(x) for _ in range(3)])
        assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(runs[0][0], runs[0][1])


def test_gates_tell_samples_apart() -> None:
    t = e2pass.transform(residual_mlp(), torch.randn(8, 12), config=config())
    train(t, 60)
    t.model.eval()
    assert t.model.e2_slu is not None
    t.model.e2_slu.reset_statistics()
    t.model(torch.randn(200, 12))
    shares = t.model.e2_slu.skipped_share(evaluation=True)
    assert shares is not None
    assert ((shares > 0.02) & (shares < 0.98)).any()


def test_the_cost_term_reaches_the_gates_and_only_them() -> None:
    t = e2pass.transform(residual_mlp(), torch.randn(8, 12), config=config(inject=False))
    t.model(torch.randn(8, 12))
    term = t.cost_term()
    assert 0 < term.item() < 1
    term.backward()
    for name, parameter in t.model.named_parameters():
        if not name.startswith("e2_"):
            assert parameter.grad is None, name
    assert t.model.e2_slu is not None
    assert any(p.grad is not None and p.grad.any() for p in t.model.e2_slu.parameters())


SETTINGS = {
    "slu": config(),
    "random": config("random", 0.5),
    "e2train": e2pass.Config(smd=None),
    "psg": e2pass.PRESETS["psg"],
    "8bit": e2pass.PRESETS["8bit"],
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["preact_resnet", "residual_mlp", "gpt2"])
def test_batches_of_any_size(name: str, setting: str) -> None:
    model, inputs = ZOO[name].make()
    t = e2pass.transform(model, inputs, config=SETTINGS[setting])
    optimizer = torch.optim.SGD(t.param_groups(lr=0.01))
    for batch in (6, 1, 2, 13, 3, 6, 1):
        for training in (True, False):
            t.model.train(training)
            resized = {k: _resize(v, batch) for k, v in inputs.items()} if isinstance(inputs, dict) else None
            output = tensors(call(t.model, _resize(inputs, batch) if resized is None else resized))[0]
            assert output.shape[0] == batch
            assert output.isfinite().all()
            if training:
                optimizer.zero_grad()
                output.square().mean().backward()
                assert all(p.grad.isfinite().all() for p in t.model.parameters() if p.grad is not None)
                optimizer.step()


def _resize(tensor: object, batch: int) -> Tensor:
    assert isinstance(tensor, Tensor)
    return tensor[torch.arange(batch) % len(tensor)]
