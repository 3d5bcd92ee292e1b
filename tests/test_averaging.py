"""``update_bn`` and learned gates: what they skip under weights that they were not trained with."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import e2pass
from e2pass.demo.data import load_digits
from e2pass.runtime.gates import SLUGates
from e2pass.runtime.module import E2Module
from tests.runtime.test_slu import config, residual_mlp
from tests.zoo import conv_residual, image_net


def gates(model: E2Module) -> SLUGates:
    assert model.e2_slu is not None
    return model.e2_slu


def skipped(model: E2Module, batches: list[Tensor]) -> float:
    """What a copy skips in evaluation."""
    twin = copy.deepcopy(model).eval()
    gates(twin).reset_statistics()
    with torch.no_grad():
        for batch in batches:
            twin(batch)
    ratio = gates(twin).skip_ratio(evaluation=True)
    assert ratio is not None
    return ratio


def with_other_weights(t: e2pass.Transformed) -> None:
    """Gates that see other logits than those of their statistics."""
    with torch.no_grad():
        gates(t.model).head.weight.mul_(3.0)
        gates(t.model).head.bias.add_(2.0)


def test_one_gate_skips_the_target_to_the_sample() -> None:
    batches = [torch.randn(20, 12) for _ in range(5)]
    t = e2pass.transform(residual_mlp(1), batches[0], config=config(skip=0.3))
    for batch in batches:
        t.model(batch).sum().backward()
    with_other_weights(t)
    assert abs(skipped(t.model, batches) - 0.3) > 0.2
    kept = {n: b.clone() for n, b in gates(t.model).named_buffers()}
    e2pass.update_bn(batches, t.model)
    assert skipped(t.model, batches) == pytest.approx(0.3)  # 30 of 100: a body of layer norms does not change the gate
    moved = {n for n, b in gates(t.model).named_buffers() if not torch.equal(b, kept[n])}
    assert moved == {"gates.0.logit_mean", "gates.0.logit_var", "price"}


def test_gates_that_decide_for_a_batch_skip_the_target_to_the_batch() -> None:
    batches = [torch.randn(6, 12) + torch.randn(12) for _ in range(10)]
    t = e2pass.transform(residual_mlp(1), batches[0], config=config(skip=0.4, per="batch"))
    for batch in batches:
        t.model(batch).sum().backward()
    with_other_weights(t)
    assert skipped(t.model, batches) in (0.0, 1.0)
    e2pass.update_bn(batches, t.model)
    assert skipped(t.model, batches) == pytest.approx(0.4)


def test_several_gates_share_the_target_by_their_energy() -> None:
    batches = [torch.randn(50, 12) for _ in range(4)]
    t = e2pass.transform(residual_mlp(4), batches[0], config=config(skip=0.5))
    with torch.no_grad():
        gates(t.model).weight.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    for batch in batches:
        t.model(batch).sum().backward()
    with_other_weights(t)
    e2pass.update_bn(batches, t.model)
    assert skipped(t.model, batches) == pytest.approx(0.5, abs=0.03)  # what a block does changes the next gate a little


@pytest.mark.parametrize("kind", ["learned", "random"])
def test_after_an_error_gates_are_as_before(kind: str) -> None:
    good = torch.randn(8, 12)
    t = e2pass.transform(residual_mlp(2), good, config=config(kind))
    t.model(good).sum().backward()
    kept = {n: b.clone() for n, b in gates(t.model).named_buffers()}
    with pytest.raises(e2pass.E2PassError, match="does not run on it"):
        e2pass.update_bn([good, good[:, :5]], t.model)
    assert all(torch.equal(b, kept[n]) for n, b in gates(t.model).named_buffers())
    e2pass.update_bn([torch.full_like(good, torch.nan)], t.model)
    assert all(torch.equal(b, kept[n]) for n, b in gates(t.model).named_buffers())
    t.model(good).sum().backward()  # and go on learning
    assert torch.equal(gates(t.model).price, kept["price"]) == (kind == "random")


@pytest.mark.slow
def test_averaged_weights_of_a_short_run_skip_the_target_on_digits() -> None:
    data, target, steps = load_digits(), 0.7, 50
    (x, y), test = data.train.tensors, [data.test.tensors[0]]
    torch.manual_seed(0)
    net = image_net(*(m for _ in range(4) for m in (conv_residual(8), nn.ReLU())))
    t = e2pass.transform(net, x[:64], config=config(skip=target))
    optimizer = torch.optim.SGD(t.param_groups(lr=0.1, gates_lr=0.01), momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[0.1, 0.1, 0.01], total_steps=steps)
    averaged: AveragedModel | None = None
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        chosen = torch.randint(0, len(x), (64,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(t.model(x[chosen]), y[chosen]).backward()
        optimizer.step()
        schedule.step()
        if step >= steps // 2:
            averaged = averaged or AveragedModel(t.model)
            averaged.update_parameters(t.model)
    assert averaged is not None
    model: E2Module = averaged.module  # type: ignore[assignment]
    assert abs(skipped(model, test) - target) > 0.08
    e2pass.update_bn(x.split(64), averaged)
    assert abs(skipped(model, test) - target) < 0.03
