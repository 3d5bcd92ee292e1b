"""Exported models of operators that torch's exporter, or onnxruntime, treats wrongly, against PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import e2pass
from e2pass.backends.onnx_export import check_inference, export_inference, export_training, functions, training_state
from e2pass.errors import ExportError
from e2pass.runtime import ops
from tests.zoo import Residual


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        return self.attention(x, x, x, need_weights=False)[0]


def mixed(x: Tensor) -> Tensor:
    """Products, diagonals and overlapping windows."""
    square = x.view(-1, 3, 4)
    parts = [x * x.prod(1, keepdim=True), square.diagonal(0, 1, 2), x.unfold(1, 4, 2).flatten(1)]
    return torch.cat(parts, 1)[:, :12] + torch.mv(torch.ones(4, 12).T, x.mean(1))


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    # onnxruntime multiplies a transposed matrix and a vector wrongly, as in the power iteration.
    "spectral norm": lambda: (
        nn.Sequential(nn.Linear(12, 16), Residual(parametrizations.spectral_norm(nn.Linear(16, 16)), nn.Tanh())),
        torch.randn(4, 12),
    ),
    "weight norm": lambda: (
        nn.Sequential(nn.Linear(12, 16), Residual(parametrizations.weight_norm(nn.Linear(16, 16)), nn.Tanh())),
        torch.randn(4, 12),
    ),
    # The layout of what attention returns is that of its query, and views depend on it.
    "attention": lambda: (
        nn.Sequential(Attention(), Residual(nn.Linear(12, 12), Attention()), nn.Flatten()),
        torch.randn(4, 5, 12),
    ),
    "pooling": lambda: (
        nn.Sequential(
            nn.Conv2d(3, 4, 3),
            Residual(nn.AvgPool2d(3, 1, 1, divisor_override=4), nn.Conv2d(4, 4, 1), nn.Tanh()),
            nn.AvgPool2d(2, 2, 1, ceil_mode=True, count_include_pad=False),
            nn.AdaptiveMaxPool2d((3, 2)),
            nn.Upsample(scale_factor=1.5, mode="bilinear"),
            nn.Flatten(),
        ),
        torch.randn(4, 3, 9, 10),
    ),
    "double": lambda: (
        nn.Sequential(nn.Linear(12, 12), nn.LayerNorm(12), Residual(nn.Linear(12, 12), nn.Tanh())).double(),
        torch.randn(4, 12, dtype=torch.float64),
    ),
    "mixed": lambda: (
        nn.Sequential(nn.Linear(12, 12), Function(mixed), Residual(nn.Linear(12, 12), nn.Tanh())),
        torch.randn(4, 12),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_both_forms_do_what_pytorch_does(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name]()
    target = torch.tensor([0, 1, 2, 3])
    t = e2pass.transform(model, x, config="slu")
    optimizer = torch.optim.SGD(t.param_groups(0.05), lr=0.05)
    assert check_inference(export_inference(t, x, tmp_path / "m.onnx"), t, x) <= 1e-5
    path = export_training(t, x, target, tmp_path / "step.onnx", optimizer=optimizer)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    given, _ = [i.name for i in session.get_inputs()]
    outputs = [o.name for o in session.get_outputs()]
    found = dict(zip(outputs, session.run(None, {given: x.numpy(), "target": target.numpy()}), strict=True))
    t.model.train()
    loss = nn.functional.cross_entropy(t.model(x), target)
    loss.backward()
    optimizer.step()
    assert float(found["loss"]) == pytest.approx(float(loss.detach()), rel=1e-5)
    for key, value in training_state(t, optimizer).items():
        if f"next.{key}" in found and not key.startswith("e2_slu."):  # of gates more is rounding error
            np.testing.assert_allclose(found[f"next.{key}"], value.numpy(), rtol=1e-4, atol=1e-5, err_msg=key)


def test_a_lowered_region_is_given_the_layout_that_it_was_traced_with() -> None:
    """Attention returns a transposed tensor, which the next region views; PyTorch alone would refuse that view."""
    torch.manual_seed(0)
    model, x = nn.Sequential(Attention(), Residual(Attention()), Residual(Attention())), torch.randn(4, 5, 12)
    t = e2pass.transform(model, x, config="e2train")
    with t.set_gates("open"):
        t.model(x).sum().backward()
    assert all(p.grad is not None for n, p in t.model.named_parameters() if not n.startswith("e2_slu"))


def test_next_powers_of_two_are_pytorchs() -> None:
    powers = np.exp2(np.arange(-126, 128)).astype(np.float32)
    neighbours = [np.nextafter(powers, np.float32(0)), np.nextafter(powers, np.float32(np.inf))]
    scales = np.concatenate([powers, *neighbours, [np.nan]], dtype=np.float32)
    function = onnx.FunctionProto.FromString(functions._library()["NextPowerOfTwo"].SerializeToString())
    graph = onnx.parser.parse_graph("g (float[N] scale) => (float[N] power) { power = e2pass.NextPowerOfTwo(scale) }")
    opsets = [onnx.helper.make_opsetid("", functions.OPSET), onnx.helper.make_opsetid(functions.DOMAIN, 1)]
    model = onnx.helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"scale": scales})
    np.testing.assert_array_equal(found, ops.next_power_of_two(torch.from_numpy(scales)).numpy())


def test_a_type_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    x = torch.randn(4, 12, dtype=torch.bfloat16)
    t = e2pass.transform(nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 4)).bfloat16(), x, config="slu")
    with pytest.raises(ExportError, match=r"0\.weight is in bfloat16, which cannot be exported"):
        export_inference(t, x, tmp_path / "m.onnx")
    with pytest.raises(ExportError, match="convert the model to float or half first"):
        export_training(t, x, torch.zeros(4, dtype=torch.int64), tmp_path / "step.onnx")
    t = e2pass.transform(nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 4)).double(), x.double(), config="8bit")
    with pytest.raises(ExportError, match=r"0\.weight is in double precision, for which ONNX has no codes; convert"):
        export_inference(t, x.double(), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []
