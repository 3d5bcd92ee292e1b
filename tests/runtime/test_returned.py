"""What a model returns beside computed tensors: parameters, buffers, constants, sizes, in its own containers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import e2pass
from e2pass.backends.onnx_export import check_inference, export_inference, export_training
from tests.zoo import Residual


class Named(NamedTuple):
    scores: Tensor
    size: Any


class Returning(nn.Module):
    steps: Tensor

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.a, self.block, self.b = nn.Linear(12, 12), Residual(nn.Linear(12, 12), nn.Tanh()), nn.Linear(12, 4)
        self.register_buffer("steps", torch.ones(2))

    def forward(self, x: Tensor) -> Any:
        y = self.b(self.block(self.a(x)))
        if self.form == "tensors":
            return y, self.a.weight, torch.ones(3), self.steps, x
        if self.form == "nested":
            return {"y": y, "rest": [self.a.weight, {"rows": x.shape[0] + 1, "kind": "scores"}], "none": None}
        return Named(y, (x.shape, x.dtype))


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return isinstance(found, Tensor) and torch.equal(found, expected)
    if isinstance(expected, dict):
        return (
            type(found) is dict and found.keys() == expected.keys() and all(same(found[k], expected[k]) for k in found)
        )
    if isinstance(expected, list | tuple):
        return type(found) is type(expected) and all(map(same, found, expected))
    return bool(found == expected)


@pytest.mark.parametrize("form", ["tensors", "nested", "named"])
def test_a_call_returns_what_the_model_does(form: str) -> None:
    torch.manual_seed(0)
    model, x = Returning(form), torch.randn(4, 12)
    t = e2pass.transform(model, x, config="neutral")
    for training in (True, False):
        model.train(training)
        t.model.train(training)
        for batch in (x, x[:3]):
            assert same(t.model(batch), model(batch))
    _, weight, *_ = t.model(x) if form == "tensors" else (0, t.model.get_parameter("a.weight"))
    assert weight is t.model.get_parameter("a.weight")  # a penalty on it reaches the parameter


def test_exported_models_return_them_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, target = torch.randn(4, 12), torch.tensor([0, 1, 2, 3])
    t = e2pass.transform(Returning("tensors"), x, config="slu")

    def penalised(output: Any, labels: Tensor) -> Tensor:
        total: Tensor = nn.functional.cross_entropy(output[0], labels) + output[1].square().sum()
        return total

    assert check_inference(export_inference(t, x, tmp_path / "m.onnx"), t, torch.randn(7, 12)) <= 1e-5
    path = export_training(t, x, target, tmp_path / "step.onnx", loss=penalised, gradients=True)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    loss, gradient = session.run(["loss", "grad.a.weight"], {"x": x.numpy(), "target": target.numpy()})
    found = penalised(t.model.train()(x), target)
    found.backward()
    assert float(loss) == pytest.approx(float(found.detach()), rel=1e-5)
    expected = t.model.get_parameter("a.weight").grad
    torch.testing.assert_close(torch.from_numpy(gradient), expected, rtol=1e-4, atol=1e-5)
