"""States, rates and losses that do not fit: one clear sentence each, and nothing is changed by halves."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import e2pass
from e2pass.backends.onnx_export import export_training
from e2pass.errors import ConfigError, E2PassError, InputError, LoaderError
from e2pass.optim import SignSGD
from e2pass.transformed import Transformed
from tests.zoo import conv_residual, image_net

IMAGES = torch.randn(4, 3, 8, 8)
DATA = TensorDataset(torch.randn(16, 3, 8, 8), torch.zeros(16, dtype=torch.long))


def made(config: str, blocks: int = 1, loader: bool = False) -> Transformed:
    settings = e2pass.PRESETS[config].model_copy(update={} if loader else {"smd": None})
    model = image_net(*(conv_residual(8) for _ in range(blocks)))
    return e2pass.transform(model, IMAGES, DataLoader(DATA, batch_size=4) if loader else None, config=settings)


def refused(call: Callable[[], object], *words: str, kind: type[E2PassError] = InputError) -> None:
    with pytest.raises(E2PassError) as caught:
        call()
    assert type(caught.value) is kind
    message = str(caught.value)
    assert "\n" not in message
    assert "\t" not in message
    assert len(message) < 300
    for word in words:
        assert word in message, message


def contents(t: Transformed) -> list[Tensor]:
    return [v.clone() for v in t.model.state_dict().values() if isinstance(v, Tensor)] + [torch.get_rng_state()]


@pytest.mark.parametrize(
    ("saved", "held", "words"),
    [
        ("slu", "e2train", ("it lacks running scales", "e2_scales", "configuration")),
        ("8bit", "e2train", ("it lacks gates (e2_slu)", "configuration")),
        ("e2train", "slu", ("it has besides running scales", "configuration")),
        ("e2train", "psg", ("it has besides gates", "configuration")),
    ],
)
def test_states_of_other_configurations(saved: str, held: str, words: tuple[str, ...]) -> None:
    state, t = made(saved).state_dict(), made(held)
    before = contents(t)
    refused(lambda: t.load_state_dict(state), *words)
    assert all(map(torch.equal, before, contents(t)))


def test_states_of_other_models_and_other_things() -> None:
    t = made("e2train")
    state, deeper = copy.deepcopy(t.state_dict()), made("e2train", blocks=2).state_dict()
    with torch.no_grad():
        for parameter in t.model.parameters():
            parameter.add_(1.0)
    before = contents(t)
    model = state["model"]
    without = {k: v for k, v in model.items() if not k.startswith("e2_")}
    reshaped = {**model, next(iter(without)): torch.zeros(1)}
    optimizer = torch.optim.SGD(t.param_groups(lr=0.1), momentum=0.9)
    cases: list[tuple[Any, tuple[str, ...]]] = [
        (deeper, ("it has besides", "more")),
        ({**state, "model": without}, ("gates", "scales")),
        ({**state, "model": reshaped}, ("other shapes have",)),
        ({**state, "model": None}, ("NoneType",)),
        ({**state, "model": optimizer.state_dict()}, ("it has besides param_groups and 1 more",)),
        (optimizer.state_dict(), ("has no loader, model, random",)),
        (without, ("t.state_dict()",)),
        (None, ("NoneType", "t.state_dict()")),
        ("run.pt", ("str",)),
        ({**state, "random": None}, ("'random'",)),
        ({**state, "random": {}}, ("'random'",)),
        ({**state, "random": {**state["random"], "torch": 3}}, ("'random'",)),
        ({**state, "random": {**state["random"], "python": (3, (1, 2), None)}}, ("'random'",)),
    ]
    for wrong, words in cases:
        refused(lambda wrong=wrong: t.load_state_dict(wrong), *words)  # type: ignore[misc]
        assert all(map(torch.equal, before, contents(t)))
    t.load_state_dict(state)


def test_states_of_other_runs_leave_the_model_alone() -> None:
    t = made("smd", loader=True)
    state = copy.deepcopy(t.state_dict())
    with torch.no_grad():
        for parameter in t.model.parameters():
            parameter.add_(1.0)
    before = contents(t)
    other = {**state, "loader": {**state["loader"], "p": 0.25}}
    refused(lambda: t.load_state_dict(other), "SMD(p=0.25", kind=LoaderError)
    refused(lambda: t.load_state_dict({**state, "loader": None}), "without a loader")
    refused(lambda: t.load_state_dict({**state, "loader": 3}), "SMDLoader", kind=LoaderError)
    assert all(map(torch.equal, before, contents(t)))
    evaluated = made("smd")  # to look at a model its data is not needed
    evaluated.load_state_dict(state)
    assert all(
        torch.equal(v, evaluated.model.state_dict()[k]) for k, v in state["model"].items() if isinstance(v, Tensor)
    )


WRONG: list[Any] = [-1.0, math.nan, math.inf, "0.1", None, True]


@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_rates_of_optimizers(value: Any) -> None:
    parameters = [nn.Parameter(torch.ones(2))]
    t = made("slu")
    refused(lambda: SignSGD(parameters, lr=value), "lr", kind=ConfigError)
    refused(lambda: SignSGD(parameters, lr=0.1, momentum=value), "momentum", kind=ConfigError)
    refused(lambda: SignSGD(parameters, lr=0.1, weight_decay=value), "weight_decay", kind=ConfigError)
    refused(lambda: SignSGD([{"params": parameters, "lr": value}], lr=0.1), "lr", kind=ConfigError)
    refused(lambda: t.param_groups(value), "lr", kind=ConfigError)
    refused(lambda: t.param_groups(0.1, value), "weight_decay", kind=ConfigError)
    if value is not None:
        refused(lambda: t.param_groups(0.1, gates_lr=value), "gates_lr", kind=ConfigError)


def test_a_learning_rate_may_be_a_tensor() -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([3.0, -2.0])
    SignSGD([parameter], lr=torch.tensor(0.5)).step()  # type: ignore[arg-type]
    assert parameter.tolist() == [0.5, 1.5]


@pytest.mark.parametrize(
    "rates",
    [
        {"drop": 2.0},
        {"drop": math.nan},
        {"skip": {0: -0.1}},
        {"use": {"conv.weight": 1.5}},
        {"default_use": -1.0},
        {"batch": 0},
    ],
    ids=str,
)
def test_rates_that_are_no_shares(rates: dict[str, Any]) -> None:
    refused(lambda: e2pass.Rates(**rates), next(iter(rates)), kind=ConfigError)


def test_options_out_of_range_say_what_is_allowed() -> None:
    refused(lambda: e2pass.SMD(p=1.0), "SMD.p = 1.0", "it should be less than 1", kind=ConfigError)
    refused(lambda: e2pass.SLU(skip=1.5), "SLU.skip = 1.5", "less than 1", kind=ConfigError)
    refused(lambda: e2pass.Bits(w=17), "Bits.w = 17", "less than or equal to 16", kind=ConfigError)
    refused(lambda: e2pass.SMD(drop=1.0), "no key 'drop'", "p, seed, coast", kind=ConfigError)  # type: ignore[call-arg]


LOSSES: dict[str, tuple[Callable[..., Any], str]] = {
    "vector": (lambda output, target: nn.functional.cross_entropy(output, target, reduction="none"), "one number"),
    "float": (lambda output, target: 1.0, "returns a float"),
    "None": (lambda output, target: None, "returns a NoneType"),
    "tuple": (lambda output, target: (output.sum(), 1), "returns a tuple"),
    "detached": (lambda output, target: output.detach().sum(), "no gradient"),
    "accuracy": (lambda output, target: (output.argmax(1) == target).float().mean(), "no gradient"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_that_are_none(name: str, tmp_path: Path) -> None:
    loss, words = LOSSES[name]
    t = e2pass.transform(image_net(conv_residual(8)), IMAGES, config="neutral", loss=loss)
    t.report()
    (said,) = [str(d) for d in t.diagnostics if d.code == "E2P602"]
    assert words in said
    file = tmp_path / "step.onnx"
    refused(lambda: export_training(t, IMAGES, torch.arange(4), file, loss=loss), words)
    assert not file.exists()


def test_arguments_of_the_exported_step(tmp_path: Path) -> None:
    t, labels, file = made("slu"), torch.arange(4), tmp_path / "step.onnx"
    refused(lambda: e2pass.transform(t.unwrap(), IMAGES, loss=3), "loss is a int", kind=ConfigError)  # type: ignore[arg-type]
    refused(lambda: export_training(t, IMAGES, labels, file, loss=3), "loss is a int")  # type: ignore[arg-type]
    refused(lambda: export_training(t, IMAGES, "labels", file), "target is a str")  # type: ignore[arg-type]
    refused(lambda: export_training(t, IMAGES, labels > 1, file), "class indices")
    optimizer = torch.optim.SGD(t.param_groups(0.1), lr=0.1)
    optimizer.param_groups[0]["lr"] = math.nan
    refused(
        lambda: export_training(t, IMAGES, labels, file, optimizer=optimizer), "learning rate nan", kind=ConfigError
    )
    assert not list(tmp_path.iterdir())


def test_a_regression_loss_is_priced_with_targets_of_the_outputs_shape() -> None:
    """It would take class labels too, with a warning, and price another loss."""
    t = e2pass.transform(image_net(conv_residual(8)), IMAGES, config="neutral", loss=nn.functional.mse_loss)
    assert t.graph["data/loss-target"].outputs[0].shape == (4, 10)
