"""Names of a model's arguments and tensors that an export could take for its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import e2pass
from e2pass.backends.onnx_export import check_inference, export_inference, export_training
from e2pass.errors import ExportError
from tests.zoo import vector_residual


class Net(nn.Module):
    """Its forward has the arguments that are asked for, and one parameter more."""

    def __init__(self, parameter: str = "weight") -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 16), vector_residual(16), nn.Linear(16, 7))
        self.register_parameter(parameter, nn.Parameter(torch.ones(12)))

    def both(self, a: Tensor, b: Tensor) -> Any:
        return self.body(a + 2 * b) + sum(p.sum() for p in self._parameters.values() if p is not None)


class Colliding(Net):
    def forward(self, weight: Tensor, loss: Tensor) -> Any:
        return self.both(weight, loss)


class OfTheStep(Net):
    def forward(self, target: Tensor, constant_0: Tensor) -> Any:
        return self.both(target, constant_0)


class Nested(Net):
    def forward(self, x: Any) -> Any:
        return {"weight": self.both(x["a.b"], x["a_b"]), "x": x["a_b"]}


VALUES = torch.randn(4, 12), torch.randn(4, 12)


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [
        (Colliding, VALUES),
        (Colliding, {"loss": VALUES[0], "weight": VALUES[1]}),
        (OfTheStep, VALUES),
        (Nested, ({"a.b": VALUES[0], "a_b": VALUES[1]},)),
    ],
)
def test_any_name_of_an_argument_will_do(tmp_path: Path, kind: type[Net], inputs: Any) -> None:
    torch.manual_seed(0)
    target = torch.randint(0, 7, (4,))
    t = e2pass.transform(kind(), inputs, config="slu")
    assert check_inference(export_inference(t, inputs, tmp_path / "m.onnx"), t, inputs) <= 1e-5

    def loss(output: Any, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output["weight"] if isinstance(output, dict) else output, labels)

    path = export_training(t, inputs, target, tmp_path / "step.onnx", loss=loss)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    assert names[-1] == "target"
    tensors = t.model._executable.capture.bind(
        inputs if isinstance(inputs, tuple) else (), inputs if isinstance(inputs, dict) else {}
    )
    feeds = {n: v.numpy() for n, v in zip(names, [*tensors, target], strict=True)}
    found = dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))
    t.model.train()
    output = t.model(**inputs) if isinstance(inputs, dict) else t.model(*inputs)
    loss(output, target).backward()
    assert float(found["loss"]) == pytest.approx(float(loss(output, target).detach()), rel=1e-5)
    weight = t.model.get_parameter("weight")
    assert weight.grad is not None
    np.testing.assert_allclose(found["next.weight"], (weight - 0.1 * weight.grad).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["loss", "target"])
def test_a_tensor_with_a_name_of_the_step_is_refused(tmp_path: Path, name: str) -> None:
    class Plain(Net):
        def forward(self, x: Tensor) -> Any:
            return self.both(x, x)

    t = e2pass.transform(Plain(name), VALUES[0], config="slu")
    with pytest.raises(ExportError, match=f"the model has a tensor named {name}, a name that the exported step has"):
        export_training(t, VALUES[0], torch.zeros(4, dtype=torch.int64), tmp_path / "step.onnx")
    assert list(tmp_path.iterdir()) == []


def test_groups_of_one_name_have_a_learning_rate_each(tmp_path: Path) -> None:
    t = e2pass.transform(nn.Sequential(nn.Linear(12, 16), vector_residual(16)), VALUES[0], config="slu")
    parameters = list(t.model.parameters())
    groups = [{"params": parameters[:1], "name": "a", "lr": 0.1}, {"params": parameters[1:], "name": "a", "lr": 0.2}]
    path = export_training(
        t, VALUES[0], torch.zeros(4, dtype=torch.int64), tmp_path / "step.onnx", optimizer=torch.optim.SGD(groups)
    )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert {"lr.a", "lr.a_1"} <= {i.name for i in session.get_overridable_initializers()}
