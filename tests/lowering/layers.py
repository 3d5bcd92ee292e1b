"""Layers to draw from: every kind of convolution and matrix product, tiny, with the bilinear map written out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from e2pass.config import PSG, Bits
from e2pass.lowering import Joint, ValueSpec, lower
from e2pass.lowering.joint import BATCH
from e2pass.passes.predict_signs import PredictSignsJoint
from e2pass.passes.quantize import QuantizeJoint
from e2pass.runtime.region import CompiledRegion
from tests.lowering.reference import Function


@dataclass(frozen=True)
class Drawn:
    """A layer without bias, its map, the shape of its input, and the weight's dimension of output channels."""

    name: str
    layer: nn.Module
    function: Function
    shape: tuple[int, ...]
    out_axis: int


class Product(nn.Module):
    """A parameter and an activation in an expression of the user's."""

    def __init__(self, shape: tuple[int, ...], function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_CONV_T = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_PLAIN = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_TRANSPOSED = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}


@st.composite
def convolutions(draw: st.DrawFn) -> Drawn:
    dims = draw(st.sampled_from([1, 2, 2, 3]))
    transposed = draw(st.booleans())
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    width = draw(st.sampled_from([1, 2]))
    ins, outs = groups * width, groups * draw(st.sampled_from([1, 2]))
    stride, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    kernel, padding = draw(st.integers(1, 3)), draw(st.integers(0, 1))
    reach = dilation * (kernel - 1) + 1
    size = max(draw(st.integers(3, 6 if dims < 3 else 4)), reach)
    padding = min(padding, reach // 2)
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    layer = (_CONV_T if transposed else _CONV)[dims](ins, outs, kernel, bias=False, **options)
    plain: Any = (_TRANSPOSED if transposed else _PLAIN)[dims]
    name = f"{'transposed ' if transposed else ''}conv{dims}d {ins}->{outs} k{kernel} {options}"
    return Drawn(name, layer, lambda x, w: plain(x, w, **options), (3, ins, *([size] * dims)), 1 if transposed else 0)


_MATRIX: list[tuple[str, Callable[[], nn.Module], Function, tuple[int, ...], int]] = [
    ("linear", lambda: nn.Linear(7, 5, bias=False), functional.linear, (4, 7), 0),
    ("linear over tokens", lambda: nn.Linear(7, 5, bias=False), functional.linear, (3, 4, 7), 0),
    *(
        (name, lambda shape=shape, f=f: Product(shape, f), f, x, axis)
        for name, shape, f, x, axis in [
            ("mm", (6, 5), lambda x, w: torch.mm(x, w), (4, 6), 1),
            ("matmul over tokens", (6, 5), lambda x, w: x @ w, (3, 4, 6), 1),
            ("weight on the left", (3, 5), lambda x, w: w.t() @ x, (4, 3, 6), 1),
            ("bmm", (2, 6, 5), lambda x, w: torch.bmm(x.transpose(0, 1), w), (4, 2, 6), 2),
            ("addmm", (6, 5), lambda x, w: torch.addmm(x.new_zeros(5), x, w), (4, 6), 1),
            ("baddbmm", (2, 6, 5), lambda x, w: torch.baddbmm(x.new_zeros(1), x.transpose(0, 1), w), (4, 2, 6), 2),
            ("einsum over heads", (6, 2, 5), lambda x, w: torch.einsum("bti,ihd->bhtd", x, w), (3, 4, 6), 2),
            ("einsum of experts", (3, 6, 5), lambda x, w: torch.einsum("bei,eio->beo", x, w), (4, 3, 6), 2),
        ]
    ),
]


def matrix_products() -> st.SearchStrategy[Drawn]:
    return st.sampled_from(_MATRIX).map(lambda m: Drawn(m[0], m[1](), m[2], m[3], m[4]))


def region(layer: nn.Module, shape: tuple[int, ...], bits: Bits | None, psg: PSG | None) -> CompiledRegion:
    """The layer, lowered and rewritten as a transformed model's region is."""
    return CompiledRegion(joint(layer, shape, bits, psg))


def joint(layer: nn.Module, shape: tuple[int, ...], bits: Bits | None, psg: PSG | None) -> Joint:
    root = nn.Module()
    root.layer = layer
    graph = fx.Graph()
    graph.output((graph.call_module("layer", (graph.placeholder("x"),)),))
    spec = ValueSpec((BATCH, *shape[1:]), torch.float32, True)
    found = lower(fx.GraphModule(root, graph), [spec], shape[0])
    if bits is not None:
        QuantizeJoint(bits)(found, False)
    if psg is not None:
        PredictSignsJoint(psg, stats=psg.stats)(found, False)
    return found


def run_joint(joint: Joint, weight: Tensor, x: Tensor, gy: Tensor) -> dict[fx.Node, Any]:
    """Every value of a joint graph, node by node."""
    seen: dict[fx.Node, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            seen[n] = super().run_node(n)
            return seen[n]

    given = {"param": weight, "input": x, "tangent": gy, "step": torch.zeros((), dtype=torch.int64)}
    with torch.no_grad():
        Recorder(joint.graph_module).run(*(given[kind] for kind, _ in joint.inputs))
    return seen
