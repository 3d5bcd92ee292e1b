"""Operators that ask for the batch size as a number, that check values, and layers that keep computed tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import e2pass
from e2pass.capture.copies import copied
from tests.zoo import PooledHead, Residual


def test_an_operator_that_fixes_the_batch_size_has_a_graph_for_each() -> None:
    """Fractional pooling draws its windows for a number of samples; of a batch of one too."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.FractionalMaxPool2d(2, output_ratio=0.5),
        Residual(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()),
        PooledHead(4),
    )
    t = e2pass.transform(model, torch.randn(4, 3, 8, 8), config="e2train")
    for training in (True, False):
        t.model.train(training)
        for samples in (4, 1, 3, 4):
            t.model.zero_grad()
            output = t.model(torch.randn(samples, 3, 8, 8))  # a region that is not lowered warns
            assert output.shape == (samples, 10)
            output.sum().backward()
            gradient = t.model.get_parameter("0.weight").grad
            assert gradient is not None
            assert gradient.abs().sum() > 0
    cache = t.model._executable.cache
    assert cache is not None
    found = [entry.joint for key, entries in cache.entries.items() if key[0] == "trunk_0" for entry in entries]
    assert {joint.batch for joint in found if joint.fixed} == {1, 3, 4}
    assert all(joint.accepts(joint.batch) and not joint.accepts(joint.batch + 1) for joint in found if joint.fixed)


class Checked(nn.Module):
    """One-hot codes, whose classes PyTorch checks."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.one_hot(x.argmax(1), self.classes) * x[:, : self.classes]


def test_what_an_operator_checks_is_checked_in_a_lowered_region() -> None:
    torch.manual_seed(0)
    x = torch.zeros(4, 12)
    x[:, 3] = 1.0
    model = nn.Sequential(Checked(8), Residual(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 4))
    bits = e2pass.Bits(x=16, w=16)
    t = e2pass.transform(model, x, config=e2pass.Config(smd=None, slu=None, psg=None, bits=bits))
    torch.testing.assert_close(t.model(x), model(x), rtol=1e-3, atol=1e-3)
    x[0, 11] = 2.0
    for net in (model, t.model):
        with pytest.raises(RuntimeError, match="smaller than num_classes"):
            net(x)


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("hook", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.parametrize("called", [False, True])
def test_former_hooks_of_a_weight_are_traced_and_copied(hook: Callable[[nn.Module], nn.Module], called: bool) -> None:
    """They keep the weight that they computed, which autograd lets nobody copy."""
    torch.manual_seed(0)
    x = torch.randn(4, 12)
    model = nn.Sequential(nn.Linear(12, 12), Residual(hook(nn.Linear(12, 12)), nn.Tanh()), nn.Linear(12, 4))
    if called:
        model(x)
    reference = copied(model)
    t = e2pass.transform(model, x, config="neutral")
    optimizers = [torch.optim.SGD(t.param_groups(0.1), lr=0.1), torch.optim.SGD(reference.parameters(), lr=0.1)]
    for _ in range(3):
        for net, optimizer in zip((t.model, reference), optimizers, strict=True):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
    assert torch.equal(t.model(x), reference(x))
    assert torch.equal(t.unwrap().eval()(x), reference.eval()(x))
