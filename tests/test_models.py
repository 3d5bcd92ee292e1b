from __future__ import annotations

import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from e2pass.errors import InputError
from e2pass.models import mobilenet_v2, resnet

BUILDERS: dict[str, Callable[[], nn.Module]] = {"resnet": lambda: resnet(8), "mobilenet_v2": mobilenet_v2}


def forward_macs(model: nn.Module) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, 32, 32))
    return float(counter.get_total_flops() / 2)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def resnet_closed_form(n: int) -> tuple[int, int]:
    """MACs and parameters of the three-stage ResNet, layer by layer: (size, in, out, kernel) of every convolution."""
    convs = [(32, 3, 16, 3)]
    for size, before, here in ((32, 16, 16), (16, 16, 32), (8, 32, 64)):
        convs += [(size, before, here, 3)] + [(size, here, here, 3)] * (2 * n - 1)
        if before != here:
            convs.append((size, before, here, 1))
    macs = sum(size * size * i * o * k * k for size, i, o, k in convs) + 640
    weights = sum(i * o * k * k + 2 * o for _, i, o, k in convs) + 650  # each convolution has a norm of 2 * o
    return macs, weights


def mobilenet_closed_form() -> tuple[int, int]:
    """MACs and parameters of MobileNetV2 at 32x32, from table 2 of its paper with the first two strides set to 1."""
    macs, weights, size, before = 32 * 32 * 27 * 32, 27 * 32 + 64, 32, 32
    table = [(1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    for t, here, repeats, first_stride in table:
        for i in range(repeats):
            wide = before * t
            if t > 1:
                macs += size * size * before * wide
                weights += before * wide + 2 * wide
            size //= first_stride if i == 0 else 1
            macs += size * size * wide * (9 + here)
            weights += wide * (9 + here) + 2 * wide + 2 * here
            before = here
    return macs + size * size * before * 1280 + 12800, weights + before * 1280 + 2560 + 12810


# Forward MACs and parameters known for the paper's networks, with 1x1 shortcuts.
@pytest.mark.parametrize(
    ("depth", "mega_macs", "mega_parameters"), [(38, 83.28, 0.564), (74, 168.22, 1.147), (110, 253.15, 1.731)]
)
def test_resnet_has_the_cost_of_the_paper(depth: int, mega_macs: float, mega_parameters: float) -> None:
    model = resnet(depth)
    assert forward_macs(model) / 1e6 == pytest.approx(mega_macs, abs=0.005)
    assert parameters(model) / 1e6 == pytest.approx(mega_parameters, abs=0.0005)


@pytest.mark.parametrize("depth", [8, 20, 38])
def test_resnet_matches_the_closed_form(depth: int) -> None:
    model = resnet(depth)
    assert (forward_macs(model), parameters(model)) == resnet_closed_form((depth - 2) // 6)


def test_resnet_depth_counts_the_weighted_layers_of_the_main_path() -> None:
    weighted = [
        name
        for name, module in resnet(20).named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and "projection" not in name
    ]
    assert len(weighted) == 20


def test_mobilenet_matches_the_closed_form() -> None:
    model = mobilenet_v2()
    assert (forward_macs(model), parameters(model)) == mobilenet_closed_form()


@pytest.mark.parametrize("depth", [0, 2, 7, 18, 21, -4, 20.0, "20"])
def test_resnet_refuses_a_depth_that_is_not_6n_plus_2(depth: int) -> None:
    with pytest.raises(InputError, match=r"depth must be 6n \+ 2"):
        resnet(depth)


@pytest.mark.parametrize("build", [lambda n: resnet(8, num_classes=n), mobilenet_v2])
@pytest.mark.parametrize("num_classes", [0, -1, 1.5])
def test_models_refuse_a_senseless_number_of_classes(build: Callable[[int], nn.Module], num_classes: int) -> None:
    with pytest.raises(InputError, match="num_classes"):
        build(num_classes)


@pytest.mark.parametrize("name", BUILDERS)
def test_models_are_symbolically_traceable(name: str) -> None:
    model = BUILDERS[name]().eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


@pytest.mark.parametrize("name", BUILDERS)
def test_models_survive_pickle_and_save(name: str) -> None:
    model = BUILDERS[name]().eval()
    x = torch.randn(2, 3, 32, 32)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for copy in (pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert torch.equal(copy(x), model(x))


@pytest.mark.parametrize("name", BUILDERS)
def test_models_train_every_parameter(name: str) -> None:
    model = BUILDERS[name]()
    scores = model(torch.randn(4, 3, 32, 32))
    nn.functional.cross_entropy(scores, torch.tensor([0, 3, 5, 9])).backward()
    without = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@pytest.mark.parametrize("name", BUILDERS)
def test_kaiming_init_keeps_the_signal_of_every_convolution(name: str) -> None:
    model = BUILDERS[name]()
    for key, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            mode = "fan_out" if name == "resnet" else "fan_in"
            fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(module.weight)
            expected = (2 / (fan_out if mode == "fan_out" else fan_in)) ** 0.5
            assert module.weight.std().item() == pytest.approx(expected, rel=0.25), key


def test_resnet_takes_other_image_sizes_and_class_counts() -> None:
    assert resnet(8, num_classes=7)(torch.randn(2, 3, 8, 8)).shape == (2, 7)
    assert mobilenet_v2(num_classes=3)(torch.randn(2, 3, 64, 64)).shape == (2, 3)
