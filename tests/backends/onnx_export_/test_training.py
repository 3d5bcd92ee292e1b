"""The exported training step in onnxruntime, against the transformed model trained in PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import e2pass
from e2pass.backends.onnx_export import export_training, training_state
from e2pass.backends.onnx_export.update import update_of
from e2pass.demo.data import load_digits
from e2pass.errors import ConfigError, ExportError, InputError
from e2pass.transformed import Transformed
from tests.zoo import Residual, vector_net, vector_residual

BATCH = 32
Arrays = dict[str, np.ndarray[Any, Any]]


Loss = Callable[[Any, Tensor], Tensor]


def torch_step(
    t: Transformed, opt: torch.optim.Optimizer, x: Tensor, y: Tensor, of: Loss = functional.cross_entropy
) -> float:
    t.model.train()
    opt.zero_grad()
    loss = of(t.model(x), y)
    loss.backward()
    opt.step()
    return float(loss.detach())


@dataclass
class Pair:
    """A model that trains in PyTorch and the file of its step."""

    t: Transformed
    opt: torch.optim.Optimizer
    path: Path
    loss: Loss = functional.cross_entropy

    def __post_init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"])
        self.outputs = [o.name for o in self.session.get_outputs()]
        self.known = {i.name for i in self.session.get_overridable_initializers()}
        (self.x,) = [i.name for i in self.session.get_inputs() if i.name != "target"]

    def state(self) -> Arrays:
        return {k: v.numpy().copy() for k, v in training_state(self.t, self.opt).items() if k in self.known}

    def onnx_step(self, x: Tensor, y: Tensor, state: Arrays) -> Arrays:
        feeds = {self.x: x.numpy(), "target": y.numpy(), **state}
        return dict(zip(self.outputs, self.session.run(None, feeds), strict=True))

    def torch_step(self, x: Tensor, y: Tensor) -> float:
        return torch_step(self.t, self.opt, x, y, self.loss)

    def differences(self, found: Arrays) -> dict[str, float]:
        """Of every tensor's new value, relative to its largest element; what the file does not change, did not."""
        return {
            name: float(np.abs(found[f"next.{name}"] - value.numpy()).max()) / max(float(value.abs().max()), 1e-3)
            for name, value in training_state(self.t, self.opt).items()
            if f"next.{name}" in found
        }


def advanced(found: Arrays) -> Arrays:
    return {name.removeprefix("next."): value for name, value in found.items() if name.startswith("next.")}


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits().train.tensors
    return images, labels


@pytest.fixture(scope="module")
def signs(digits: tuple[Tensor, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """ResNet-8 with gates, low precision and predicted signs; both find the same codes in forward.

    Else these would tell nothing: a sum in another order moves an activation to the next code, everything behind it
    follows, and a part of the signs differs, between PyTorch's own kernels too (docs/export.md).
    """
    torch.manual_seed(0)
    images, labels = digits
    t = e2pass.transform(e2pass.models.resnet(8), images[:BATCH], config="bit-true")
    opt = torch.optim.SGD(t.param_groups(0.05, weight_decay=1e-4), lr=0.05, momentum=0.9)
    path = tmp_path_factory.mktemp("step") / "step.onnx"
    assert export_training(t, images[:BATCH], labels[:BATCH], path, optimizer=opt, gradients=True) == path
    return Pair(t, opt, path)


@pytest.mark.slow
def test_each_step_from_pytorchs_state(signs: Pair, digits: tuple[Tensor, Tensor]) -> None:
    """20 steps: at least 99.9 % of the signs of each are equal, and so is, but for averaging, what forward found."""
    images, labels = digits
    entered = []
    for step in range(20):
        batch = slice(BATCH * step, BATCH * (step + 1))
        before = signs.state()
        found = signs.onnx_step(images[batch], labels[batch], before)
        loss = signs.torch_step(images[batch], labels[batch])
        assert float(found["loss"]) == pytest.approx(loss, rel=1e-6)
        equal = total = 0
        for name, p in signs.t.model.named_parameters():
            if p.grad is not None:
                same = np.sign(found[f"grad.{name}"]) == np.sign(p.grad.numpy())
                equal, total = equal + int(same.sum()), total + same.size
        assert equal / total >= 0.999
        for name, value in signs.state().items():
            if "running" in name or "e2_scales" in name:  # averages of powers of two: another one would show
                np.testing.assert_allclose(found[f"next.{name}"], value, rtol=1e-6, atol=1e-7)
        entered.append(found["next.e2_slu.opened"] - before["e2_slu.opened"])
    shares = np.stack(entered) / BATCH
    assert ((shares > 0) & (shares < 1)).any(0).all(), "gates that decide alike for all samples would prove nothing"


def free_epoch(pair: Pair, images: Tensor, labels: Tensor) -> tuple[list[float], list[float]]:
    """Losses of an epoch in PyTorch and in onnxruntime, each going on from its own state."""
    state, plain, exported = pair.state(), [], []
    for start in range(0, len(labels) - BATCH + 1, BATCH):
        batch = slice(start, start + BATCH)
        found = pair.onnx_step(images[batch], labels[batch], state)
        state = state | advanced(found)
        exported.append(float(found["loss"]))
        plain.append(pair.torch_step(images[batch], labels[batch]))
    return plain, exported


@pytest.mark.slow
@pytest.mark.parametrize("config", ["slu", "bit-true"], ids=["slu", "signs"])
def test_a_free_epoch_ends_at_the_same_loss(config: Any, digits: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    """From weights of two epochs: in the first, rounding alone parts PyTorch's own kernels by a tenth."""
    torch.manual_seed(0)
    images, labels = digits
    t = e2pass.transform(e2pass.models.resnet(8), images[:BATCH], config=config)
    opt = torch.optim.SGD(t.param_groups(0.05, weight_decay=1e-4), lr=0.05, momentum=0.9)
    for start in [*range(0, len(labels) - BATCH + 1, BATCH)] * 2:
        torch_step(t, opt, images[start : start + BATCH], labels[start : start + BATCH])
    for group in opt.param_groups:
        group["lr"] *= 0.1
    path = export_training(t, images[:BATCH], labels[:BATCH], tmp_path / "step.onnx", optimizer=opt)
    plain, exported = free_epoch(Pair(t, opt, path), images, labels)
    assert np.mean(exported[-10:]) == pytest.approx(np.mean(plain[-10:]), rel=0.05)
    assert np.mean(exported[-10:]) < 0.9 * np.mean(exported[:10])


@pytest.mark.slow
def test_a_step_whose_regions_are_lowered_while_it_is_traced(digits: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    """Without oneDNN, activations of a traced step come in another memory order than those of one that runs."""
    images, labels = (values[:BATCH] for values in digits)
    onednn = torch._C._get_mkldnn_enabled()
    try:
        for enabled in (True, False):
            torch._C._set_mkldnn_enabled(enabled)
            t = e2pass.transform(e2pass.models.resnet(8), images, config="bit-true")
            opt = torch.optim.SGD(t.param_groups(0.05), lr=0.05)
            torch_step(t, opt, images, labels)
            pair = Pair(t, opt, export_training(t, images, labels, tmp_path / "step.onnx", optimizer=opt))
            found = pair.onnx_step(images, labels, pair.state())
            assert float(found["loss"]) == pytest.approx(pair.torch_step(images, labels), rel=1e-4)
    finally:
        torch._C._set_mkldnn_enabled(onednn)


def test_blocks_that_nobody_enters_do_not_move(signs: Pair, digits: tuple[Tensor, Tensor]) -> None:
    """No gradient, so no decay and no momentum either; the rest still learns, and energy gets cheaper."""
    images, labels = digits
    state = signs.state()
    state["e2_slu.price"] = np.array(100.0, np.float32)
    found = signs.onnx_step(images[:BATCH], labels[:BATCH], state)
    assert found["next.e2_slu.opened"].sum() == state["e2_slu.opened"].sum()
    for name, value in advanced(found).items():
        if ".conv1." in name or ".bn2." in name:
            assert np.array_equal(value, state[name]), name
    assert not np.array_equal(found["next.conv.weight"], state["conv.weight"])
    assert found["next.e2_slu.price"] < state["e2_slu.price"]
    assert np.isfinite(found["loss"])


def test_the_file_holds_the_present_state_in_standard_operators(signs: Pair) -> None:
    model = onnx.load(signs.path)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for f in model.functions for node in f.node} <= {"", "e2pass"}
    assert {f.domain for f in model.functions} == {"e2pass", "e2pass.region"}
    assert {"Encode", "MostSignificant", "Select"} <= {f.name for f in model.functions}
    kinds = [n.op_type for part in (model.graph, *model.functions) for n in part.node]
    assert "BatchNormalization" not in kinds  # of inference: it would normalise by the running statistics
    stored = {i.name for i in model.graph.initializer}
    assert {name for name, _ in signs.t.model.named_parameters()} <= stored
    assert [f.name for f in signs.path.parent.iterdir()] == ["step.onnx"]


@pytest.mark.slow
def test_full_precision_agrees_to_rounding(digits: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    """Gates without PSG, another architecture, optimizer and loss; from a checkpoint and without."""
    torch.manual_seed(1)
    images, labels = digits
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.MaxPool2d(2),
        Residual(nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 3, padding=1, groups=8)),
        nn.AvgPool2d(2),
        Residual(nn.GroupNorm(2, 8), nn.GELU(), nn.Conv2d(8, 8, 1)),
        nn.Flatten(),
        nn.LayerNorm(128),
        nn.Linear(128, 10),
    )
    t = e2pass.transform(model, images[:BATCH], config="slu")
    opt = torch.optim.AdamW(t.param_groups(0.01, weight_decay=0.1), lr=0.01)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(output, target, label_smoothing=0.1)

    fresh = copy.deepcopy(t.state_dict())
    path = export_training(t, images[:BATCH], labels[:BATCH], tmp_path / "a.onnx", loss=loss, optimizer=opt)
    pair = Pair(t, opt, path, loss)
    for step in range(6):
        batch = slice(BATCH * step, BATCH * (step + 1))
        found = pair.onnx_step(images[batch], labels[batch], pair.state())
        assert float(found["loss"]) == pytest.approx(pair.torch_step(images[batch], labels[batch]), rel=1e-5)
        for name, difference in pair.differences(found).items():
            # A standardised logit does not depend on the bias: its gradient is rounding error, and Adam scales it up.
            if not name.startswith("e2_slu.head.bias"):
                # Standardising cancels most of what reaches a gate, so more of it is rounding error.
                assert difference < (1e-2 if name.startswith("e2_slu.") else 2e-4), name
    again = export_training(
        t, images[:BATCH], labels[:BATCH], tmp_path / "b.onnx", loss=loss, checkpoint=fresh, optimizer=None
    )
    stored = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(again).graph.initializer}
    np.testing.assert_array_equal(stored["0.weight"], fresh["model"]["0.weight"].numpy())
    assert not np.array_equal(stored["0.weight"], t.model.state_dict()["0.weight"].numpy())


def test_steps_of_one_sample_move_the_statistics_of_logits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(3, 1, 12), torch.tensor([[0], [1], [2]])
    t = e2pass.transform(vector_net(vector_residual(16), vector_residual(16)), x[0], config="slu")
    opt = torch.optim.SGD(t.param_groups(0.01), lr=0.01, momentum=0.9)
    pair = Pair(t, opt, export_training(t, x[0], y[0], tmp_path / "step.onnx", optimizer=opt))
    for sample, label in zip(x, y, strict=True):
        before = pair.state()
        found = pair.onnx_step(sample, label, before)
        pair.torch_step(sample, label)
        moved = [n for n in before if n.endswith(("logit_mean", "logit_var")) and before[n] != found[f"next.{n}"]]
        assert len(moved) == 4
        assert all(difference < 1e-5 for name, difference in pair.differences(found).items() if name in moved)


def test_gradients_of_a_block_that_is_called_twice_are_summed_before_the_sign(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(3, 8, 12), torch.randint(0, 10, (3, 8))
    block = vector_residual(16)
    t = e2pass.transform(vector_net(block, block), x[0], config="e2train")
    opt = torch.optim.SGD(t.param_groups(0.05), lr=0.05, momentum=0.9)
    path = export_training(t, x[0], y[0], tmp_path / "step.onnx", optimizer=opt, gradients=True)
    pair, shared = Pair(t, opt, path), {"1.body.1.weight", "1.body.3.weight"}
    assert set(t.model._executable.shared.values()) == shared
    for batch, labels in zip(x, y, strict=True):
        found = pair.onnx_step(batch, labels, pair.state())
        assert float(found["loss"]) == pytest.approx(pair.torch_step(batch, labels), rel=1e-5)
        for name in shared:
            gradient = t.model.get_parameter(name).grad
            assert gradient is not None
            assert len(gradient.unique()) == 2  # a sum of signs would have zeros and twice the magnitude too
            np.testing.assert_allclose(found[f"grad.{name}"], gradient.numpy(), rtol=1e-5)
        differences = pair.differences(found).items()
        assert all(d < 1e-4 for name, d in differences if not name.startswith("e2_slu.head.bias"))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01),
        lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.8, 0.9), eps=1e-6),
        lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01, maximize=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.01),
        lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, betas=(0.5, 0.5)),
        lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True, maximize=True),
        lambda p: e2pass.optim.SignSGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
        lambda p: e2pass.optim.SignSGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, sign_at="momentum", scale="mean"),
        lambda p: e2pass.optim.SignSGD([{"params": list(p), "sign": False}], lr=0.1, momentum=0.9, weight_decay=0.01),
    ],
)
def test_updates_are_those_of_torch_optim(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    layer = nn.Linear(5, 3).double()
    opt = make(layer.parameters())
    if opt.param_groups[0].get("dampening"):  # of a first step SGD damps nothing
        layer(torch.randn(2, 5).double()).sum().backward()
        opt.step()
    update = update_of(opt, layer)
    (group,) = update.groups
    values = {name: p.detach().clone() for name, p in layer.named_parameters()}
    states = {name: dict(update.state[name]) for name in values}
    lr = torch.tensor(group.lr, dtype=torch.float64)
    for _ in range(5):
        for name, p in layer.named_parameters():
            p.grad = torch.randn_like(p)
            values[name], states[name] = group.rule(values[name], p.grad, states[name], lr, group.options)
        opt.step()
    present = update_of(opt, layer).state
    for name, p in layer.named_parameters():
        torch.testing.assert_close(values[name], p.detach())
        torch.testing.assert_close(states[name], dict(present[name]), check_dtype=False)


def test_what_cannot_be_exported_is_named(tmp_path: Path) -> None:
    inputs, target = torch.randn(4, 12), torch.zeros(4, dtype=torch.int64)
    t = e2pass.transform(vector_net(vector_residual(16)), inputs, config="slu")
    path = tmp_path / "step.onnx"
    with pytest.raises(ConfigError, match="the update of Adagrad cannot be exported; those that can are SGD, Adam"):
        export_training(t, inputs, target, path, optimizer=torch.optim.Adagrad(t.model.parameters()))
    opt = torch.optim.SGD(t.model.parameters(), lr=0.1, momentum=0.9, dampening=0.5)
    with pytest.raises(ConfigError, match=r"0\.weight has no momentum yet, .* take a step in PyTorch first"):
        export_training(t, inputs, target, path, optimizer=opt)
    with pytest.raises(InputError, match="the optimizer holds parameters that are not the model's"):
        export_training(t, inputs, target, path, optimizer=torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    with pytest.raises(InputError, match="there is no checkpoint"):
        export_training(t, inputs, target, path, checkpoint=tmp_path / "none.pt")
    with pytest.raises(
        InputError,
        match=r"not one of this model: it lacks gates \(e2_slu\), 0.bias and \d+ more; it has besides weight$",
    ):
        export_training(t, inputs, target, path, checkpoint={"weight": torch.zeros(2)})
    odd = {**t.model.state_dict(), "0.bias": torch.zeros(3)}
    with pytest.raises(InputError, match=r"not one of this model: other shapes have 0.bias$"):
        export_training(t, inputs, target, path, checkpoint={"model": odd})
    with pytest.raises(InputError, match="give a target: the model does not return its loss"):
        export_training(t, inputs, None, path)
    with pytest.raises(ExportError, match=r"the loss looks at values of its tensors, .* write it with torch\.where"):
        export_training(t, inputs, target, path, loss=lambda y, _: y.sum() if float(y.sum()) > 0 else y.mean())
    with t.set_gates("random"), pytest.raises(ExportError, match=r"export with set_gates\('learned'\)"):
        export_training(t, inputs, target, path)
    assert list(tmp_path.iterdir()) == []


def test_an_operator_without_onnx_form_is_named_with_its_place(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            values = torch.linalg.eigvalsh(x.detach().view(-1, 3, 3))
            shifted: Tensor = x + values.sum()
            return shifted

    inputs, target = torch.randn(4, 12), torch.zeros(4, dtype=torch.int64)
    t = e2pass.transform(nn.Sequential(nn.Linear(12, 9), Odd()), inputs, config="slu")
    with pytest.raises(ExportError, match=r"operator aten\._linalg_eigh\.default in region trunk_0 \(module 1\)"):
        export_training(t, inputs, target, tmp_path / "step.onnx")
    assert list(tmp_path.iterdir()) == []
