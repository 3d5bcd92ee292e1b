"""Operations for the tests: single ones with given shapes, and those of real joint graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors  # noqa: TID251
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException

from e2pass.cost import Free, OpCost, OpSite, TensorSpec, Unsupported
from tests.zoo import call, tensors


def T(*shape: int, bits: int = 32) -> TensorSpec:
    return TensorSpec(shape, bits)


def site(op: str, args: tuple[Any, ...], *outputs: TensorSpec, **kwargs: Any) -> OpSite:
    return OpSite("test", op, args, outputs, kwargs)


def conv(n: int, c: int, o: int, size: int, k: int = 3, *, groups: int = 1, bits: tuple[int, int] = (32, 32)) -> OpSite:
    """A convolution with stride 1 that keeps the size (odd ``k``)."""
    x, w, p = T(n, c, size, size, bits=bits[0]), T(o, c // groups, k, k, bits=bits[1]), k // 2
    args = (x, w, None, (1, 1), (p, p), (1, 1), False, (0, 0), groups)
    return site("aten.convolution.default", args, T(n, o, size, size))


def conv_backward(forward: OpSite, mask: tuple[bool, bool, bool], gy_bits: int = 32) -> OpSite:
    """The backward of a forward convolution, for the gradients in ``mask``."""
    x, w, _, *rest = forward.args
    gy = TensorSpec(forward.outputs[0].shape, gy_bits)
    results = [TensorSpec(x.shape), TensorSpec(w.shape), TensorSpec((w.shape[0],))]
    wanted = [r for r, flag in zip(results, mask, strict=True) if flag]
    return site("aten.convolution_backward.default", (gy, x, w, (w.shape[0],), *rest, mask), *wanted)


def mm(m: int, k: int, n: int, a_bits: int = 32, b_bits: int = 32) -> OpSite:
    return site("aten.mm.default", (T(m, k, bits=a_bits), T(k, n, bits=b_bits)), T(m, n))


def priced(cost: OpCost | Free | Unsupported) -> OpCost:
    assert isinstance(cost, OpCost), cost
    return cost


class _Flat(nn.Module):
    """A model called with its example inputs, returning the floating tensors of its output."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        super().__init__()
        self.model, self.inputs = model, inputs
        self.names = list(inputs) if isinstance(inputs, dict) else None

    @property
    def flat_inputs(self) -> tuple[Tensor, ...]:
        if isinstance(self.inputs, dict):
            return tuple(self.inputs.values())
        return self.inputs if isinstance(self.inputs, tuple) else (self.inputs,)

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        given = args if self.names is None else dict(zip(self.names, args, strict=True))
        return tuple(t for t in tensors(call(self.model, given)) if t.is_floating_point())


def joint_sites(model: nn.Module, inputs: Any) -> list[OpSite]:
    """Trace a training step of ``model`` with AOTAutograd; return its operations."""
    flat = _Flat(model, inputs)
    try:
        gm = _joint(flat, flat.flat_inputs)
    except DataDependentOutputException:  # transformers inspect mask values, which fake tensors lack: export first
        gm = _joint(torch.export.export(flat, flat.flat_inputs).module(), flat.flat_inputs)
    return list(_sites(gm))


def _joint(module: nn.Module, args: tuple[Tensor, ...]) -> fx.GraphModule:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with contextlib.ExitStack() as stack, mode:
        fake = tuple(mode.from_tensor(a) for a in args)
        graph = aot_export_joint_with_descriptors(stack, module, fake).graph_module
    assert isinstance(graph, fx.GraphModule)
    return graph


def _sites(gm: fx.GraphModule) -> Iterator[OpSite]:
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        value = node.meta.get("val")
        results = value if isinstance(value, tuple | list) else (value,)
        yield OpSite(
            node.name,
            str(node.target),
            tuple(_argument(a) for a in node.args),
            tuple(_argument(r) for r in results if isinstance(r, Tensor)),
            {key: _argument(a) for key, a in node.kwargs.items()},
        )


def _argument(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return _argument(value.meta.get("val"))
    if isinstance(value, Tensor):
        return TensorSpec(tuple(int(s) for s in value.shape), value.element_size() * 8)
    if isinstance(value, list | tuple):
        return tuple(_argument(v) for v in value)
    return value
