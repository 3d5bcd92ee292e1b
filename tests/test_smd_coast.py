"""Coasting against explicit steps with zero gradients, for every optimizer that torch has."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from e2pass.config import SMD
from e2pass.errors import LoaderError
from e2pass.smd import coast, drop_batches
from tests.smd_data import Counting

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "ASGD": {}, "Adadelta": {}, "Adafactor": {}, "Adagrad": {}, "Adam": {"amsgrad": True}, "AdamW": {}, "Adamax": {},
    "LBFGS": {}, "Muon": {}, "NAdam": {}, "RAdam": {}, "RMSprop": {"momentum": 0.9}, "Rprop": {},
    "SGD": {"momentum": 0.9, "nesterov": True}, "SparseAdam": {},
}  # fmt: skip


def test_no_optimizer_of_torch_is_left_out() -> None:
    classes = {name for name, value in vars(torch.optim).items() if isinstance(value, type)}
    assert {name for name in classes if issubclass(getattr(torch.optim, name), torch.optim.Optimizer)} - {
        "Optimizer"
    } == set(OPTIMIZERS)


def trained(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a small model after two ordinary steps."""
    torch.manual_seed(0)
    sparse = name == "SparseAdam"
    model: nn.Module = nn.EmbeddingBag(8, 3, sparse=True) if sparse else nn.Linear(4, 3, bias=False)
    settings = dict(OPTIMIZERS[name])
    if name not in ("LBFGS", "SparseAdam", "Rprop"):
        settings["weight_decay"] = 0.1
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.05, **settings)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = model(torch.arange(4).view(2, 2) if sparse else torch.ones(2, 4)).square().sum()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    return model, optimizer


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"LBFGS", "SparseAdam"}))
def test_equals_explicit_zero_gradients(name: str) -> None:
    model, optimizer = trained(name)
    expected, reference = copy.deepcopy((model, optimizer))
    weight = next(model.parameters())
    before, grad = weight.detach().clone(), weight.grad
    coast(optimizer, 3)
    for _ in range(3):
        for parameter in expected.parameters():
            parameter.grad = torch.zeros_like(parameter)
        reference.step()
    assert torch.equal(weight, next(expected.parameters()))
    assert torch.equal(weight, before) == (name == "Rprop")  # which has neither momentum nor decay
    assert weight.grad is grad  # put back, not cleared
    torch.testing.assert_close(optimizer.state_dict(), reference.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["LBFGS", "SparseAdam"])
def test_optimizers_without_anything_to_coast_stay(name: str) -> None:
    model, optimizer = trained(name)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    coast(optimizer, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_optimizers_that_change_the_gradient_get_a_new_one_each_step() -> None:
    class InPlace(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            weight.grad.add_(1.0)  # type: ignore[union-attr]
            super().step(closure)

    weight = nn.Parameter(torch.tensor(0.0))
    coast(InPlace([weight], lr=1.0), 3)
    assert weight.item() == -3.0


def test_frozen_parameters_stay() -> None:
    frozen, free = nn.Parameter(torch.ones(2), requires_grad=False), nn.Parameter(torch.ones(2))
    coast(torch.optim.SGD([frozen, free], lr=1.0, weight_decay=0.5))
    assert frozen.tolist() == [1, 1]
    assert free.tolist() == [0.5, 0.5]
    assert free.grad is None


def test_the_loader_coasts_through_each_dropped_step_in_its_place() -> None:
    loader = drop_batches(DataLoader(Counting(40), batch_size=2), SMD(p=0.5, coast=True))
    weight = nn.Parameter(torch.tensor(1.0))
    optimizer = torch.optim.SGD([weight], lr=0.01, momentum=0.9, weight_decay=0.1)
    loader.coast(optimizer)
    loader.coast(optimizer)  # twice is once
    for _ in range(3):
        for batch in loader:
            optimizer.zero_grad()
            (weight * batch.mean()).backward()
            optimizer.step()
    expected = nn.Parameter(torch.tensor(1.0))
    reference = torch.optim.SGD([expected], lr=0.01, momentum=0.9, weight_decay=0.1)
    for epoch in range(3):
        for step, keep in enumerate(loader.schedule.keeps(epoch, 20)):
            expected.grad = torch.tensor(2 * step + 0.5) if keep else torch.tensor(0.0)
            reference.step()
    assert loader.stats()["dropped"] > 10
    assert torch.equal(weight, expected)


def test_dropped_steps_do_nothing_without_coast() -> None:
    loader = drop_batches(DataLoader(Counting(40), batch_size=2), SMD(p=0.5))
    weight = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(LoaderError, match="coasting needs"):
        loader.coast(torch.optim.SGD([weight], lr=0.1, weight_decay=0.1))
    weight.grad = torch.tensor(1.0)
    list(loader)
    assert (weight.item(), weight.grad.item()) == (1.0, 1.0)


def test_coast_needs_an_optimizer() -> None:
    loader = drop_batches([1, 2], SMD(coast=True))
    with pytest.raises(LoaderError, match=r"call loader\.coast\(optimizer\) first"):
        iter(loader)
    with pytest.raises(LoaderError, match="str cannot coast"):
        loader.coast("sgd")  # type: ignore[arg-type]
