from __future__ import annotations

import pytest
import torch

import e2pass
from e2pass.transformed import Transformed
from tests.zoo import vector_net, vector_residual


def small(blocks: int = 4) -> Transformed:
    """Equal residual blocks between two layers."""
    torch.manual_seed(0)
    return e2pass.transform(vector_net(*(vector_residual(16) for _ in range(blocks))), torch.zeros(4, 12), [None, None])


@pytest.fixture(scope="session")
def transformed() -> Transformed:
    return small()
