"""The gate's network as one node of autograd, against PyTorch's own layers and finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from e2pass.runtime.gate_cell import GateCell
from e2pass.runtime.merge import inner_products


def reference(layers: Any, pooled: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, ...]:
    embed, lstm, head = layers
    h, c = lstm(embed(pooled), state)
    return head(h), h, c


def fused(layers: Any, pooled: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, ...]:
    embed, lstm, head = layers
    h, c = (None, None) if state is None else (state[0].t(), state[1].t())
    shared = (lstm.weight_ih, lstm.weight_hh, lstm.bias_ih + lstm.bias_hh, head.weight, head.bias)
    logit, h, c = GateCell.apply(pooled, h, c, embed.weight, *shared)  # type: ignore[no-untyped-call]
    return logit, h.t(), c.t()


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("used", [(0, 1, 2), (0,), (1,), (2,)])  # the last gate's state has no reader
def test_values_and_gradients_are_those_of_the_layers(first: bool, used: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(7, 4, bias=False), nn.LSTMCell(4, 4), nn.Linear(4, 1)]).double()
    pooled = torch.randn(5, 7).double()
    state = (
        None if first else (torch.randn(5, 4).double().requires_grad_(), torch.randn(5, 4).double().requires_grad_())
    )
    wanted = [*layers.parameters(), *(state or ())]
    weights = [torch.randn(5, size).double() for size in (1, 4, 4)]
    found = []
    for network in (reference, fused):
        results = network(layers, pooled, state)
        loss = torch.stack([(results[i].square() * weights[i]).sum() for i in used]).sum()
        found.append([*results, *torch.autograd.grad(loss, wanted, materialize_grads=True)])
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_second_derivatives() -> None:
    torch.manual_seed(0)
    shapes = [(3, 2), (3, 2), (3, 5), (12, 3), (12, 3), (12,), (1, 3), (1,)]
    tensors = [torch.randn(s).double().mul(0.5).requires_grad_() for s in shapes]
    pooled = torch.randn(2, 5).double()

    def cell(*tensors: Tensor) -> Any:
        return GateCell.apply(pooled, *tensors)  # type: ignore[no-untyped-call]

    assert torch.autograd.gradgradcheck(cell, tensors)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_inner_products_of_samples(layout: torch.memory_format) -> None:
    a, b = (torch.randn(3, 4, 5, 6).to(memory_format=layout) for _ in range(2))
    torch.testing.assert_close(inner_products(a, b), torch.einsum("bchw,bchw->b", a, b))
