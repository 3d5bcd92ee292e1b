"""State: keys, resuming, copies, pickles, averages; whose parameters are whose."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

import e2pass
from e2pass.transformed import Transformed
from tests.zoo import ZOO, conv_residual, image_net

FULL = e2pass.Config(smd=e2pass.SMD(p=0.3), slu=e2pass.SLU(skip=0.4), psg=e2pass.PSG(stats=True), bits=e2pass.Bits())
SLU_ONLY = e2pass.Config(smd=None, slu=e2pass.SLU(skip=0.4), psg=None, bits=None)


def small_resnet() -> nn.Module:
    torch.manual_seed(0)
    return image_net(conv_residual(8), nn.ReLU(), conv_residual(8), nn.ReLU())


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(43, 3, 8, 8, generator=generator)
    return TensorDataset(x, torch.randint(0, 10, (43,), generator=generator))


def transformed(config: e2pass.Config = FULL, with_loader: bool = True) -> Transformed:
    loader = DataLoader(data(), batch_size=6, shuffle=True) if with_loader and config.smd is not None else None
    return e2pass.transform(small_resnet(), torch.randn(6, 3, 8, 8), loader, config=config)


def optimizer_of(t: Transformed) -> torch.optim.Optimizer:
    return torch.optim.SGD(t.param_groups(lr=0.05, weight_decay=1e-3), momentum=0.9)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: list[Tensor]) -> float:
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    optimizer.step()
    return loss.item()


def endless(loader: Any) -> Iterator[list[Tensor]]:
    while True:
        yield from loader


@pytest.mark.parametrize("psg", [True, False], ids=["e2train", "smd+slu"])
def test_a_run_resumed_in_the_middle_of_an_epoch_has_bit_equal_losses(psg: bool) -> None:
    config = FULL if psg else e2pass.Config(smd=e2pass.SMD(p=0.3), slu=e2pass.SLU(), psg=None, bits=None)
    t = transformed(config)
    optimizer = optimizer_of(t)
    batches = endless(t.loader)
    for batch in islice(batches, 8):
        step(t.model, optimizer, batch)
    file = io.BytesIO()
    torch.save((t.state_dict(), optimizer.state_dict()), file)
    expected = [step(t.model, optimizer, batch) for batch in islice(batches, 10)]

    torch.manual_seed(99)  # whatever the new process does before it resumes
    again = transformed(config)
    resumed = optimizer_of(again)
    file.seek(0)
    state, optimizer_state = torch.load(file, weights_only=False)
    again.load_state_dict(state)
    resumed.load_state_dict(optimizer_state)
    actual = [step(again.model, resumed, batch) for batch in islice(endless(again.loader), 10)]
    assert actual == expected
    for name, value in t.model.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(again.model.state_dict()[name], value), name
    assert again.stats()["slu"] == t.stats()["slu"]


def test_a_taken_state_does_not_change_with_training() -> None:
    t = transformed()
    state = copy.deepcopy(t.state_dict())
    held = t.state_dict()
    for _ in zip(range(3), endless(t.loader), strict=False):
        pass
    assert held["loader"] == state["loader"]


def test_state_of_something_else_is_refused() -> None:
    t = transformed()
    with pytest.raises(e2pass.E2PassError, match=r"has no .*loader"):
        t.load_state_dict({"model": {}})


def test_a_checkpoint_of_the_original_loads_into_the_transformed_model() -> None:
    t = transformed(SLU_ONLY)
    other = small_resnet()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    result = t.model.load_state_dict(other.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert all(k.startswith("e2_") for k in result.missing_keys)
    torch.testing.assert_close(t.unwrap().eval()(torch.ones(2, 3, 8, 8)), other.eval()(torch.ones(2, 3, 8, 8)))


def by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))  # type: ignore[no-any-return]


def by_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


def by_average(model: nn.Module) -> nn.Module:
    return AveragedModel(model).module


COPIES = (copy.deepcopy, by_pickle, by_save, by_average)


@pytest.mark.parametrize("duplicate", COPIES)
@pytest.mark.parametrize("config", ["neutral", SLU_ONLY, FULL], ids=["neutral", "slu", "full"])
def test_copies_equal_and_train_on_their_own(
    duplicate: Callable[[nn.Module], nn.Module], config: e2pass.Config | str
) -> None:
    resolved = e2pass.PRESETS[config] if isinstance(config, str) else config
    t = transformed(resolved)
    x, y = data()[:6]
    step(t.model, optimizer_of(t), [x, y])  # statistics, scales and controller have moved
    twin = duplicate(t.model)
    assert twin.training
    for name, value in t.model.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(twin.state_dict()[name], value), name
    assert torch.equal(copy.deepcopy(twin).eval()(x), copy.deepcopy(t.model).eval()(x))
    before = copy.deepcopy(t.model.state_dict())
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    losses = [step(twin, optimizer, [x, y]) for _ in range(3)]
    assert len(set(losses)) == 3
    for name, value in before.items():
        if isinstance(value, Tensor):
            assert torch.equal(t.model.state_dict()[name], value), f"training the copy changed {name}"
    first = next(iter(dict(t.model.named_parameters())))
    assert not torch.equal(twin.get_parameter(first), t.model.get_parameter(first))


@pytest.mark.parametrize("duplicate", COPIES)
def test_copies_take_the_same_step_as_the_model(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    t = transformed(with_loader=False)
    batch = list(data()[:6])
    step(t.model, optimizer_of(t), batch)
    twin = duplicate(t.model)
    runs = []
    for model in (t.model, twin):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        runs.append([step(model, optimizer, batch) for _ in range(3)])
    assert runs[0] == runs[1]


def test_averaged_model_averages() -> None:
    t = transformed(SLU_ONLY)
    average = AveragedModel(t.model)
    optimizer = optimizer_of(t)
    weights = []
    name = next(n for n, _ in t.model.named_parameters())
    for _ in range(3):
        step(t.model, optimizer, list(data()[:6]))
        average.update_parameters(t.model)
        weights.append(t.model.get_parameter(name).detach().clone())
    torch.testing.assert_close(average.module.get_parameter(name).detach(), torch.stack(weights).mean(0))
    assert average.eval()(data()[:4][0]).shape == (4, 10)


def test_saved_file_does_not_hold_the_weights_twice(tmp_path: Path) -> None:
    t = transformed(SLU_ONLY)
    torch.save(t.model, tmp_path / "model.pt")
    torch.save(t.model.state_dict(), tmp_path / "state.pt")
    weights = sum(v.numel() * v.element_size() for v in t.model.state_dict().values() if isinstance(v, Tensor))
    names = sum(1 for _ in t.model.state_dict())
    assert (tmp_path / "model.pt").stat().st_size < 2 * weights + 2000 * names


def test_the_callers_model_is_unchanged() -> None:
    model = small_resnet()
    modules, state = list(model.named_modules()), copy.deepcopy(model.state_dict())
    t = e2pass.transform(model, torch.randn(6, 3, 8, 8), config=e2pass.PRESETS["psg"])
    step(t.model, optimizer_of(t), list(data()[:6]))
    assert list(model.named_modules()) == modules
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(k.startswith("e2") for k in vars(model))


def test_inplace_shares_the_callers_parameters() -> None:
    model = small_resnet()
    keys = list(model.state_dict())
    t = e2pass.transform(model, torch.randn(6, 3, 8, 8), config=SLU_ONLY, inplace=True)
    assert all(t.model.get_parameter(n) is p for n, p in model.named_parameters())
    before = copy.deepcopy(model.state_dict())
    step(t.model, optimizer_of(t), list(data()[:6]))
    assert list(model.state_dict()) == keys
    assert any(not torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert "e2_slu" not in dict(model.named_modules())


@pytest.mark.parametrize("name", ["tied_embedding", "shared_block", "gpt2"])
def test_tied_parameters_stay_tied(name: str) -> None:
    model, inputs = ZOO[name].make()
    t = e2pass.transform(model, inputs, config="neutral")
    for twin in (t.model, copy.deepcopy(t.model), by_pickle(t.model), t.unwrap()):
        groups = [
            sorted(n for n, q in owner.named_parameters(remove_duplicate=False) if q is p)
            for owner in (model, twin)
            for _, p in owner.named_parameters()
            if not _.startswith("e2_")
        ]
        assert groups[: len(groups) // 2] == groups[len(groups) // 2 :]


@pytest.mark.parametrize("config", ["neutral", "8bit"])
def test_norms_in_evaluation_stay_there(config: str) -> None:
    model = small_resnet()
    frozen, free = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)][:2]
    frozen.eval()
    before = frozen.get_buffer("running_mean").clone()
    images = torch.randn(6, 3, 8, 8)
    original = copy.deepcopy(model)
    t = e2pass.transform(model, images, config=config, inplace=True)
    assert t.verify()
    assert t.graph.nodes
    tolerance = 1e-6 if config == "neutral" else 0.1
    torch.testing.assert_close(t.model(images), original(images), rtol=0.0, atol=tolerance)
    assert torch.equal(frozen.get_buffer("running_mean"), before)
    e2pass.update_bn([images], t.model)
    assert (t.model.training, frozen.training, free.training) == (True, False, True)
    for twin in (copy.deepcopy(t.model), pickle.loads(pickle.dumps(t.model))):
        norms = [m for m in twin.modules() if isinstance(m, nn.BatchNorm2d)]
        assert [m.training for m in norms[:2]] == [False, True]


class KeepsNormFrozen(nn.Module):
    """Its norm stays in evaluation whatever ``train`` is called with; written with a branch or without."""

    def __init__(self, branches: bool) -> None:
        super().__init__()
        self.bn, self.net, self.branches = nn.BatchNorm2d(3), small_resnet(), branches
        self.bn.running_mean = torch.tensor([0.5, -0.5, 1.0])

    def train(self, mode: bool = True) -> KeepsNormFrozen:
        super().train(mode)
        self.bn.eval()
        return self

    def forward(self, x: Tensor) -> Any:
        if self.branches and x.shape[-1] > x.shape[-2]:  # torch.fx cannot trace it
            x = x.mT
        return self.net(self.bn(x))


@pytest.mark.parametrize("branches", [False, True], ids=["symbolic_trace", "export"])
@pytest.mark.parametrize("called_before", [False, True])
def test_a_class_that_keeps_its_norms_frozen_goes_on_doing_so(branches: bool, called_before: bool) -> None:
    original = KeepsNormFrozen(branches)
    if called_before:
        original.train()
    images = torch.randn(6, 3, 8, 8)
    t = e2pass.transform(original, images, config="neutral")
    assert [d.message for d in t.diagnostics if d.code == "E2P100"] == [
        "captured by " + ("export" if branches else "symbolic_trace")
    ]
    assert not [d for d in t.diagnostics if d.code == "E2P103"]
    assert t.verify()
    twin = copy.deepcopy(t.model)
    for model in (t.model, twin):
        theirs = copy.deepcopy(original)
        for mode in (False, True):
            model.train(mode)
            theirs.train(mode)
            modes = [m.training for n, m in model.named_modules() if not n.startswith("e2_")]
            assert modes == [m.training for m in theirs.modules()]
            assert model.e2_counts.training == mode
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, theirs)]
        for _ in range(2):
            for module, optimizer in zip((model, theirs), optimizers, strict=True):
                optimizer.zero_grad()
                module(images).square().sum().backward()
                optimizer.step()
            torch.testing.assert_close(model(images), theirs(images), rtol=1e-4, atol=1e-4)
        for name, buffer in theirs.named_buffers():
            torch.testing.assert_close(model.get_buffer(name), buffer, rtol=1e-4, atol=1e-5)
        assert torch.equal(model.get_buffer("bn.running_mean"), torch.tensor([0.5, -0.5, 1.0]))
