"""A device's training goes on in PyTorch: the state of an exported step, loaded into the model and its optimizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import e2pass
from e2pass.backends.onnx_export import export_training, load_training_state, training_state
from e2pass.errors import InputError
from e2pass.transformed import Transformed
from tests.zoo import vector_net, vector_residual

X = torch.randn(6, 12, generator=torch.Generator().manual_seed(3))
Y = torch.arange(6) % 4


def made() -> Transformed:
    torch.manual_seed(0)
    return e2pass.transform(vector_net(vector_residual(16)), X, config="slu")


OPTIMIZERS: dict[str, Callable[[Transformed], torch.optim.Optimizer]] = {
    "sgd": lambda t: torch.optim.SGD(t.param_groups(lr=0.05), lr=0.05, momentum=0.9),
    "adam": lambda t: torch.optim.Adam(t.param_groups(lr=0.01)),
}


def trained(file: Path, steps: int) -> tuple[dict[str, np.ndarray], list[float]]:
    """What a device does: it has the file, and nothing of this project."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    outputs = [o.name for o in session.get_outputs()]
    feeds = {session.get_inputs()[0].name: X.numpy(), "target": Y.numpy()}
    state: dict[str, np.ndarray] = {}
    losses = []
    for _ in range(steps):
        found = dict(zip(outputs, session.run(None, feeds | state), strict=True))
        state = {n.removeprefix("next."): v for n, v in found.items() if n.startswith("next.")}
        losses.append(float(found["loss"]))
    return state, losses


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("by_file", [True, False], ids=["npz", "arrays"])
def test_training_goes_on_where_the_device_stopped(name: str, by_file: bool, tmp_path: Path) -> None:
    t = made()
    export_training(t, X, Y, tmp_path / "step.onnx", optimizer=OPTIMIZERS[name](t))
    state, _ = trained(tmp_path / "step.onnx", 3)
    _, losses = trained(tmp_path / "step.onnx", 6)
    home = made()
    optimizer = OPTIMIZERS[name](home)
    np.savez(tmp_path / "trained.npz", allow_pickle=False, **state)
    load_training_state(home, tmp_path / "trained.npz" if by_file else state, optimizer)
    held = training_state(home, optimizer)
    assert all(np.array_equal(held[n].numpy(), value) for n, value in state.items())
    plain = home.unwrap().state_dict()
    assert all(np.array_equal(plain[n].numpy(), value) for n, value in state.items() if n in plain)
    for expected in losses[3:]:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(home.model(X), Y)
        loss.backward()
        optimizer.step()
        assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_rates_come_back_and_outputs_need_no_renaming() -> None:
    t = made()
    optimizer = OPTIMIZERS["sgd"](t)
    name, parameter = next(iter(t.model.named_parameters()))
    values: dict[str, Any] = {f"next.{name}": np.ones(parameter.shape, np.float32), "loss": np.float32(1.0)}
    load_training_state(t.model, values | {"lr.weights": np.float32(0.5)}, optimizer)
    assert bool((parameter == 1).all())
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.05, 0.05]


def test_states_of_something_else_change_nothing(tmp_path: Path) -> None:
    t = made()
    before = {n: v.clone() for n, v in training_state(t).items()}
    name, parameter = next(iter(t.model.named_parameters()))
    good = {name: np.ones(parameter.shape, np.float32)}
    (tmp_path / "text.npz").write_text("no arrays")
    cases: list[tuple[Any, str]] = [
        (good | {"elsewhere.weight": np.ones(3)}, "'elsewhere.weight' is none of its names"),
        ({}, "names no tensor"),
        ({f"{name}.momentum_buffer": np.ones(parameter.shape)}, "names no tensor"),
        ({name: np.ones(3)}, r"of shape \[3\] in the state"),
        (good | {f"{name}.momentum_buffer": np.ones(3)}, r"of shape \[3\] in the state"),
        (tmp_path / "none.npz", "there is no file"),
        (tmp_path / "text.npz", "no file of arrays"),
        (3, "not a int"),
    ]
    for values, words in cases:
        with pytest.raises(InputError, match=words):
            load_training_state(t, values)
    assert all(torch.equal(v, before[n]) for n, v in training_state(t).items())
