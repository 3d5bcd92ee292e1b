"""A call or a step that fails leaves the model as it was: the next one equals that of a model that never failed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import e2pass
from e2pass.errors import InputError, LoweringError
from e2pass.lowering import lower
from e2pass.runtime import runner
from e2pass.transformed import Transformed
from tests.zoo import conv_bn, conv_residual, image_net

CONFIGS = {
    "e2train": e2pass.Config(smd=None),
    "slu": e2pass.PRESETS["slu"],
    "stochastic": e2pass.Config(smd=None, slu=e2pass.SLU(gate="random"), bits=e2pass.Bits(rounding="stochastic")),
    "warmup": e2pass.Config(smd=None, psg=e2pass.PSG(warmup=2)),
}
IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(6)
BAD: dict[str, Any] = {
    "channels": torch.randn(6, 4, 8, 8),
    "size": torch.randn(6, 3, 9, 9),  # fits until the last layer
    "rank": torch.randn(6, 3),
    "double": IMAGES.double(),
    "whole numbers": torch.zeros(6, 3, 8, 8, dtype=torch.int64),
    "no tensor": "image",
}


def made(config: str, *, exported: bool = False) -> Transformed:
    """The same each time, with a last layer that refuses images of another size."""
    torch.manual_seed(0)
    blocks = [conv_residual(8), nn.ReLU(), conv_residual(8), nn.ReLU()]
    model: nn.Module = nn.Sequential(conv_bn(3, 8), nn.ReLU(), *blocks, nn.Flatten(), nn.Linear(8 * 64, 10))
    return e2pass.transform(Branching(model) if exported else model, IMAGES, config=CONFIGS[config])


class Branching(nn.Module):
    """Only ``torch.export`` captures it: norms are operators of the graph then, not modules."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Any:
        if x.mean().numel() > 1 or bool(torch.ones(1)[0].shape):
            raise ValueError("never")
        return self.body(x[tuple(slice(None) for _ in range(len(x.shape)))])


def step(t: Transformed) -> list[Tensor]:
    """Output, gradients and all state after one step."""
    t.model.zero_grad()
    output = t.model(IMAGES)
    nn.functional.cross_entropy(output, LABELS).backward()
    gradients = [torch.zeros(()) if p.grad is None else p.grad.clone() for p in t.model.parameters()]
    return [output.detach(), *gradients, *(b.clone() for b in t.model.buffers())]


def assert_same(failed: Transformed, untouched: Transformed) -> None:
    for a, b in zip(step(failed), step(untouched), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("config", "exported"), [*((config, False) for config in CONFIGS), ("e2train", True)])
def test_wrong_inputs_change_nothing(config: str, exported: bool) -> None:
    failed, untouched = made(config, exported=exported), made(config, exported=exported)
    assert_same(failed, untouched)
    for training, kinds in ((False, ("size",)), (True, tuple(BAD))):
        failed.model.train(training)
        for kind in kinds:
            with pytest.raises((RuntimeError, ValueError)):
                failed.model(BAD[kind])
    assert_same(failed, untouched)
    assert torch.equal(failed.model.eval()(IMAGES), untouched.model.eval()(IMAGES))


def test_an_interrupted_call_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    failed, untouched = made("e2train"), made("e2train")
    assert_same(failed, untouched)
    last = failed.model._runners["train"][failed.model._plan.regions[-1].name]
    with monkeypatch.context() as patched:
        patched.setattr(last, "cache", None)
        patched.setattr(last, "_run_eager", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            failed.model(IMAGES)
    assert_same(failed, untouched)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_what_cannot_be_lowered_for_one_size_is_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def picky(module: Any, specs: Any, batch: int) -> Any:
        if any(spec.shape[-1] == 12 for spec in specs):
            raise LoweringError("twelve is not for me")
        return lower(module, specs, batch)

    monkeypatch.setattr(runner, "lower", picky)
    failed, untouched = (e2pass.transform(image_net(conv_residual(8)), IMAGES, config="8bit") for _ in range(2))
    untouched.model.load_state_dict(failed.model.state_dict())
    assert_same(failed, untouched)
    precise = failed.unwrap().eval()
    failed.model.eval()
    images = torch.randn(6, 3, 12, 12)
    with pytest.warns(UserWarning, match="twelve is not for me"):
        result = failed.model(images)
    torch.testing.assert_close(result, precise(images))
    assert torch.equal(failed.model(images), result)  # and says so once
    failed.model.train()
    assert_same(failed, untouched)


@pytest.mark.parametrize("config", ["e2train", "stochastic"])
def test_an_exception_in_backward_leaves_what_the_forward_pass_left(config: str) -> None:
    failed, untouched = made(config), made(config)
    images = IMAGES.clone().requires_grad_()

    def stop(_: Tensor) -> Tensor:
        raise KeyError("in the middle of backward")

    images.register_hook(stop)
    with pytest.raises(KeyError):
        nn.functional.cross_entropy(failed.model(images), LABELS).backward()
    untouched.model(IMAGES.clone().requires_grad_())
    assert_same(failed, untouched)


@pytest.mark.parametrize("config", ["slu", "e2train"])
def test_an_earlier_pass_still_has_its_backward(config: str) -> None:
    failed, untouched = made(config), made(config)
    losses = [nn.functional.cross_entropy(t.model(IMAGES), LABELS) for t in (failed, untouched)]
    with pytest.raises(InputError, match="captured with"):
        failed.model(BAD["size"])
    for loss in losses:
        loss.backward()
    for a, b in zip(failed.model.parameters(), untouched.model.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad)  # type: ignore[arg-type]
