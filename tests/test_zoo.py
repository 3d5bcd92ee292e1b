from __future__ import annotations

import pytest
import torch

from tests.zoo import ENTRIES, ZOO, call, tensors


def test_names_are_unique() -> None:
    assert len(ZOO) == len(ENTRIES)


@pytest.mark.parametrize("name", ZOO)
def test_two_copies_are_equal_and_leave_the_random_state_alone(name: str) -> None:
    before = torch.get_rng_state()
    (first, inputs), (second, same_inputs) = ZOO[name].make(), ZOO[name].make()
    assert torch.equal(torch.get_rng_state(), before)
    outputs = tensors(call(first.eval(), inputs))
    assert outputs
    for a, b in zip(outputs, tensors(call(second.eval(), same_inputs)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ZOO)
def test_every_parameter_is_trained(name: str) -> None:
    model, inputs = ZOO[name].make()
    torch.stack([output.square().sum() for output in tensors(call(model, inputs))]).sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []
