"""Bad input gets one clear sentence of the right class, and leaves nothing behind."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import e2pass
from e2pass.errors import BoardError, CaptureError, ConfigError, E2PassError, InputError, LoaderError, StrictError
from tests.zoo import ZOO, vector_net, vector_residual


def net() -> nn.Module:
    return vector_net(vector_residual(16))


def batches(n: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(n, 12), torch.zeros(n, dtype=torch.long)), batch_size=4)


def refused(kind: type[E2PassError], call: Callable[[], object], *words: str) -> None:
    """One sentence (no line break, no traceback text) of exactly this class that names what it is about."""
    with pytest.raises(E2PassError) as caught:
        call()
    assert type(caught.value) is kind
    message = str(caught.value)
    assert "\n" not in message.strip()
    assert len(message) > 20
    assert "Traceback" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("model", [None, "resnet", lambda x: x, {"weight": 1}, nn.Linear])
def test_a_model_that_is_no_module(model: Any) -> None:
    refused(InputError, lambda: e2pass.transform(model, torch.randn(2, 12)), "torch.nn.Module")
    refused(InputError, lambda: e2pass.analyze(model, torch.randn(2, 12)), "torch.nn.Module")


@pytest.mark.parametrize(
    "inputs",
    [None, 3, "x", (), {}, [], torch.tensor(1.0), torch.empty(0, 12), {3: torch.randn(2, 12)}, (object(),)],
    ids=lambda v: type(v).__name__,
)
def test_inputs_of_the_wrong_kind(inputs: Any) -> None:
    refused(InputError, lambda: e2pass.transform(net(), inputs))


@pytest.mark.parametrize(
    "inputs",
    [
        torch.randn(2, 13),
        torch.randint(0, 5, (2, 12)),
        (torch.randn(2, 12), torch.randn(2, 12)),
        {"wrong": torch.randn(2, 12)},
    ],
    ids=["width", "dtype", "too many", "keyword"],
)
def test_inputs_that_do_not_fit_the_model(inputs: Any) -> None:
    model = net()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises((InputError, CaptureError)) as caught:
        e2pass.transform(model, inputs)
    assert len(str(caught.value).splitlines()) == 1
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_unknown_preset() -> None:
    refused(ConfigError, lambda: e2pass.transform(net(), torch.randn(2, 12), config="e3train"), "e3train", "e2train")
    refused(ConfigError, lambda: e2pass.transform(net(), torch.randn(2, 12), config=None), "preset")  # type: ignore[arg-type]
    refused(ConfigError, lambda: e2pass.analyze(net(), torch.randn(2, 12), config="e3train"), "e3train")


@pytest.mark.parametrize("section", [e2pass.SMD, e2pass.SLU, e2pass.PSG, e2pass.Bits, e2pass.Config])
def test_unknown_keys_name_the_valid_ones(section: Any) -> None:
    refused(ConfigError, lambda: section(surely_not=1), "surely_not", *section.model_fields)


@pytest.mark.parametrize(
    "make",
    [
        lambda: e2pass.SMD(p=1.0), lambda: e2pass.SMD(p=-0.1), lambda: e2pass.SLU(skip=1.0),
        lambda: e2pass.SLU(gate="ajar"), lambda: e2pass.Bits(x=1), lambda: e2pass.PSG(beta=2.0),
        lambda: e2pass.PSG(scale="median"), lambda: e2pass.Config(bits=None),
        lambda: e2pass.Config(psg=e2pass.PSG(x_bits=9)),
    ],
)  # fmt: skip
def test_values_out_of_range(make: Callable[[], object]) -> None:
    refused(ConfigError, make)


def test_unknown_board() -> None:
    refused(BoardError, lambda: e2pass.transform(net(), torch.randn(2, 12), board="zedbord"), "zedbord", "zedboard")
    refused(BoardError, lambda: e2pass.analyze(net(), torch.randn(2, 12), board="no/such/file.yaml"), "file.yaml")


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "name: x\n", "{", "name: [1, 2\n"])
def test_malformed_board_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "board.yaml"
    path.write_text(text)
    with pytest.raises(BoardError, match=r"board\.yaml"):
        e2pass.transform(net(), torch.randn(2, 12), board=str(path))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("loader", [[], (), batches(0)], ids=["list", "tuple", "DataLoader"])
def test_empty_loader(loader: Any) -> None:
    refused(LoaderError, lambda: e2pass.transform(net(), torch.randn(2, 12), loader, config="smd"), "empty")


@pytest.mark.parametrize("loader", [3, object(), "batches"])
def test_a_loader_that_is_none(loader: Any) -> None:
    refused(LoaderError, lambda: e2pass.transform(net(), torch.randn(2, 12), loader, config="smd"))


class Stream(IterableDataset[Tensor]):
    """Has no length."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.randn(24, 12))


def test_a_loader_without_length_works_and_says_so() -> None:
    t = e2pass.transform(net(), torch.randn(4, 12), DataLoader(Stream(), batch_size=4), config="smd")
    assert all(x.shape == (4, 12) for x in t.loader)
    assert 1 <= t.loader.stats()["yielded"] <= 6
    with pytest.raises(TypeError):
        len(t.loader)


def test_a_transformed_model_is_not_transformed_again() -> None:
    t = e2pass.transform(net(), torch.randn(2, 12), config="neutral")
    refused(InputError, lambda: e2pass.transform(t.model, torch.randn(2, 12)), "t.unwrap()")
    assert e2pass.transform(t.unwrap(), torch.randn(2, 12), config="neutral").verify()


def test_strict_names_what_was_left() -> None:
    model, inputs = ZOO["mlp"].make()
    refused(StrictError, lambda: e2pass.transform(model, inputs, config="slu", strict=True), "E2P203")
    e2pass.transform(net(), torch.randn(2, 12), config="slu", strict=True)


def test_a_model_that_cannot_be_copied() -> None:
    model = net()
    vars(model)["stuck"] = (i for i in range(1))  # generators cannot be copied
    refused(InputError, lambda: e2pass.transform(model, torch.randn(2, 12)), "inplace=True")


def test_arguments_of_the_transformed() -> None:
    t = e2pass.transform(net(), torch.randn(2, 12), config="8bit")
    refused(ConfigError, lambda: t.param_groups(lr=-1.0), "lr")
    refused(ConfigError, lambda: t.report("guessed"), "guessed", "assumed", "measured")
    refused(ConfigError, t.cost_term, "slu")


def test_a_failed_transform_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = net()
    state, attributes = copy.deepcopy(model.state_dict()), set(vars(model))
    loader = batches(8)
    inputs, random = torch.randn(2, 13), torch.get_rng_state()
    attempts: list[dict[str, Any]] = [{"config": "no"}, {"board": "no"}, {"strict": True, "config": "e2train"}]
    for arguments in attempts:
        try:
            e2pass.transform(model, inputs, loader, **arguments)
        except E2PassError:
            continue
        raise AssertionError("inputs that do not fit were accepted")
    assert torch.equal(torch.get_rng_state(), random)
    assert set(vars(model)) == attributes
    assert model.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("config", ["neutral", "e2train"])
def test_a_call_unlike_the_example_says_what_is_expected(config: str) -> None:
    t = e2pass.transform(net(), torch.randn(6, 12), config=config)
    name = type(net()).__name__
    expected = "'input'", name, "2 dimensions", "(batch, 12)"
    refused(InputError, lambda: t.model(torch.randn(6, 5, 12)), "(6, 5, 12)", *expected)
    refused(InputError, lambda: t.model(torch.randn(12)), "(12,)", *expected)
    refused(InputError, lambda: t.model(torch.randn(6, 13)), "'input'", name, "(6, 13)", "(batch, 12)")
    refused(InputError, lambda: t.model(torch.randn(6, 12).double()), "'input'", name, "float64", "float32")
    t.model(torch.randn(9, 12))
    u = e2pass.transform(e2pass.models.resnet(8), torch.randn(2, 3, 16, 16), config="neutral")
    assert u.model(torch.randn(2, 3, 24, 24)).shape == (2, 10)  # a convolution takes any size


def test_an_error_that_the_inputs_do_not_explain_stays_what_it_is() -> None:
    t = e2pass.transform(net(), torch.randn(6, 12), config="neutral")
    head = next(m for m in t.model.modules() if isinstance(m, nn.Linear))
    head.weight = nn.Parameter(torch.zeros(3, 5))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        t.model(torch.randn(6, 12))


class Tempered(nn.Module):
    """Takes a number that is no batch before its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, temperature: Tensor, x: Tensor) -> Any:
        return x + self.linear(x) * temperature


def test_a_first_tensor_that_is_no_batch() -> None:
    example = torch.ones(1), torch.randn(6, 4)
    refused(CaptureError, lambda: e2pass.transform(Tempered(), example), "(1,)", "(6, 4)", "a dict that begins with")
    model = Tempered()
    t = e2pass.transform(model, {"x": example[1], "temperature": example[0]}, config="neutral")
    for batch in (6, 9):
        x = torch.randn(batch, 4)
        torch.testing.assert_close(t.model(example[0], x), model(example[0], x))


def test_hooks_that_no_step_calls_are_named() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(12, 12), nn.ReLU()), nn.Linear(12, 3))
    calls: list[str] = []

    def tripled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        calls.append("block")
        return output * 3

    model[0].register_forward_hook(tripled)
    model[1].register_forward_hook(lambda module, args, output: calls.append("layer"))
    x = torch.randn(4, 12)
    t = e2pass.transform(model, x, config="neutral")
    assert [d.node for d in t.diagnostics.with_code("E2P106")] == ["0"]
    torch.testing.assert_close(t.model(x), model(x))
    calls.clear()
    t.model(x)
    assert calls == ["layer"]
