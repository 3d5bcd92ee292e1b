"""A joint graph taken from a known region is the one that tracing anew gives; what differs is traced anew."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor, fx, nn

import e2pass
from e2pass.dump import dump
from e2pass.lowering import Joint, ValueSpec, lower, reuse
from e2pass.lowering.joint import BATCH, trace_joint
from e2pass.transformed import Transformed
from tests.zoo import conv_residual, image_net

SPEC = ValueSpec((BATCH, 4, 6, 6), torch.float32, True)


@pytest.fixture(autouse=True)
def _nothing_known() -> object:
    with mock.patch.object(reuse, "_MEMO", reuse.JointMemo()):
        yield


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Joint]:
    traced: list[Joint] = []

    def trace(*args: object) -> Joint:
        traced.append(trace_joint(*args))  # type: ignore[arg-type]
        return traced[-1]

    monkeypatch.setattr(reuse, "trace_joint", trace)
    return traced


class Tupled(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.layers(x),)


def traced(module: nn.Module) -> fx.GraphModule:
    return fx.symbolic_trace(module)


RANDOM = e2pass.Config(smd=None, slu=e2pass.SLU(gate="random"), psg=None, bits=None)


def of_blocks(n: int) -> Transformed:
    model = image_net(*(layer for _ in range(n) for layer in (conv_residual(8), nn.ReLU())))
    return e2pass.transform(model, torch.randn(4, 3, 8, 8), config=RANDOM)


def test_the_blocks_of_a_stage_are_traced_once_and_keep_their_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    found = counted(monkeypatch)
    of_blocks(3)
    shallow = len(found)
    t = of_blocks(6)
    assert len(found) == shallow
    program = t._program
    model = program.model.train()
    for region in program.plans["train"].regions:
        joint, _ = program.lowered[region.name]
        anew = trace_joint(fx.GraphModule(model, region.graph), region.specs, 4)
        assert dump(joint.graph) == dump(anew.graph), region.name
        assert (joint.inputs, joint.outputs) == (anew.inputs, anew.outputs)
        assert [n.meta.get("e2_from") for n in joint.graph.nodes] == [n.meta.get("e2_from") for n in anew.graph.nodes]


def test_rewriting_one_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    module = traced(Tupled(nn.Conv2d(4, 4, 3)))
    first, before = lower(module, [SPEC], 4), dump(lower(module, [SPEC], 4).graph)
    first.set_outputs(first.output_nodes()[:1], first.outputs[:1])
    first.graph.eliminate_dead_code()
    assert dump(lower(module, [SPEC], 4).graph) == before


def frozen() -> nn.Module:
    layer = nn.Conv2d(4, 4, 3)
    layer.weight.requires_grad_(False)
    return layer


def hooked() -> nn.Module:
    layer = nn.Conv2d(4, 4, 3)
    layer.register_forward_hook(lambda module, args, out: out * 2)
    return layer


class Scaled(nn.Module):
    """Not one of torch's modules: only its own code says what it does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


class Leaf(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Scaled) or super().is_leaf_module(m, module_qualified_name)


@pytest.mark.parametrize(
    "other",
    [
        lambda: nn.Conv2d(4, 4, 3, padding=1),
        lambda: nn.Conv2d(4, 4, 3, bias=False),
        lambda: nn.Conv2d(4, 4, 3).double(),
        frozen,
        hooked,
    ],
)
def test_what_differs_is_traced_anew(other: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    found = counted(monkeypatch)
    lower(traced(Tupled(nn.Conv2d(4, 4, 3))), [SPEC], 4)
    layer = other()
    lower(traced(Tupled(layer)), [ValueSpec(SPEC.shape, layer.weight.dtype, True)], 4)  # type: ignore[arg-type]
    assert len(found) == 2
    lower(traced(Tupled(nn.Conv2d(4, 4, 3))), [SPEC], 4)
    assert len(found) == 2


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (nn.Dropout(0.1), nn.Dropout(0.2)),
        (nn.Dropout(0.1), nn.Dropout(0.1).eval()),
        (nn.BatchNorm2d(4), nn.BatchNorm2d(4, momentum=0.2)),
        (nn.Sequential(nn.ReLU(), nn.Tanh()), nn.Sequential(nn.Tanh(), nn.ReLU())),
    ],
)
def test_settings_tell_regions_apart(first: nn.Module, second: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    found = counted(monkeypatch)
    for module in (first, second, first):
        lower(traced(Tupled(nn.Conv2d(4, 4, 1), module)), [SPEC], 4)
    assert len(found) == 2


def test_foreign_modules_are_never_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    found = counted(monkeypatch)
    root = Tupled(Scaled())
    module = fx.GraphModule(root, Leaf().trace(root))
    for _ in range(2):
        lower(module, [SPEC], 4)
    assert len(found) == 2


def test_tied_weights_are_not_taken_for_two(monkeypatch: pytest.MonkeyPatch) -> None:
    found = counted(monkeypatch)
    tied, apart = (Tupled(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)) for _ in range(2))
    tied.layers[1].weight = tied.layers[0].weight
    for module in (apart, tied, apart, tied):
        lower(traced(module), [SPEC], 4)
    assert len(found) == 2


def test_a_batch_that_violates_a_guard_is_traced_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (torch.ops.aten.relu(x) * (2 if x.shape[0] > 8 else 1),)

    monkeypatch.setattr(Branch, "__module__", "torch.nn.modules.branch")

    class Keep(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return True

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = Branch()

        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (self.branch(x)[0],)

    root = Root()
    module = fx.GraphModule(root, Keep().trace(root))
    found = counted(monkeypatch)
    for batch, count in ((4, 1), (5, 1), (16, 2), (17, 2), (3, 2)):
        joint = lower(module, [SPEC], batch)
        assert joint.accepts(batch)
        assert len(found) == count
