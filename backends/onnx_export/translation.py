"""The own operators of quantization and PSG as calls of ``functions``, and what torch translates wrongly.

This is the one table: an operator added to ``e2pass.runtime.ops`` needs an entry here, and a function in ``functions``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset18

from e2pass.backends.onnx_export import functions
from e2pass.backends.onnx_export.aten import record
from e2pass.backends.onnx_export.opaque import BODIES, DOMAIN
from e2pass.errors import ExportError
from e2pass.runtime import ops  # registers torch.ops.e2pass

op: Any = opset18


def quantize(x: Any, bits: int, axis: int | None = None, power_of_two: bool = False) -> tuple[Any, Any]:
    """Translate ``e2pass::quantize``: codes at the scale of the tensor itself, or of each entry along ``axis``."""
    scale = _rounded_up(_own_scale(x, bits, axis), power_of_two)
    return _call("Encode", x, scale, limit=_limit(bits), to=_code_type(bits)), scale


def quantize_stochastic(x: Any, bits: int, axis: int | None, step: Any, stream: int) -> tuple[Any, Any]:
    """Translate ``e2pass::quantize_stochastic``; the random numbers are the runtime's, not PyTorch's."""
    del step, stream
    scale = _own_scale(x, bits, axis)
    return _call("EncodeRandomly", x, scale, limit=_limit(bits), to=_code_type(bits)), scale


def quantize_running(x: Any, bits: int, running: Any, power_of_two: bool = False) -> tuple[Any, Any]:
    """Translate ``e2pass::quantize_running``: the frozen scale, and while that is 0 (nothing seen) the tensor's own."""
    scale = _rounded_up(_call("RunningScale", x, running, limit=_limit(bits)), power_of_two)
    return _call("Encode", x, scale, limit=_limit(bits), to=_code_type(bits)), scale


def dequantize(codes: Any, scale: Any) -> Any:
    """Translate ``e2pass::dequantize``."""
    return _call("Dequantize", codes, scale)


_MSB = {"round": "MostSignificant", "floor": "MostSignificantFloor", "truncate": "MostSignificantTruncate"}


def msb(codes: Any, scale: Any, bits: int, keep: int, mode: str = "round") -> Sequence[Any]:
    """Translate ``e2pass::msb``."""
    if bits == keep:
        return op.Identity(codes), op.Identity(scale)
    attributes = {"step": float(1 << (bits - keep)), "limit": _limit(keep), "to": _code_type(keep)}
    return record(ir.node(_MSB[mode], [codes, scale], attributes, domain=functions.DOMAIN, num_outputs=2))


def threshold(g_msb: Any, beta: float) -> Any:
    """Translate ``e2pass::threshold``."""
    return _call("Threshold", g_msb, beta=beta)


def fixed_threshold(g_msb: Any, tau: float) -> Any:
    """Translate ``e2pass::fixed_threshold``."""
    return op.CastLike(op.Constant(value_float=tau), g_msb)


def select(g_msb: Any, g: Any, tau: Any) -> Any:
    """Translate ``e2pass::select``."""
    return _call("Select", g_msb, g, tau)


def sparsify(g_msb: Any, tau: Any) -> Any:
    """Translate ``e2pass::sparsify``."""
    return _call("Sparsify", g_msb, tau)


def sign(g: Any) -> Any:
    """Translate ``e2pass::sign``."""
    return _call("Sign", g)


def conv3d(
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> Any:
    """Translate ``aten::conv3d``; torch's own translation gives one without bias a bias that no runtime accepts."""
    strides, pads, dilations = (list(v) * (3 // len(v)) for v in (stride, padding, dilation))
    return op.Conv(x, weight, bias, strides=strides, pads=pads * 2, dilations=dilations, group=groups)


def matmul(a: Any, b: Any) -> Any:
    """Translate ``aten::matmul`` and ``mv``; onnxruntime 1.32 multiplies a transposed matrix and a vector wrongly."""
    first, second = (op.Constant(value_ints=[axis]) for axis in (-2, -1))
    lines = op.Unsqueeze(a, first) if len(a.shape) == 1 else a
    columns = op.Unsqueeze(b, second) if len(b.shape) == 1 else b
    product = op.MatMul(lines, columns)
    if len(b.shape) == 1:
        product = op.Squeeze(product, second)
    return op.Squeeze(product, first if len(b.shape) > 1 else second) if len(a.shape) == 1 else product


def prod(x: Any, dims: Sequence[int] | None, *, output_dtype: int | None = None) -> Any:
    """Translate ``prims::prod``, which torch's decompositions of products end in."""
    del output_dtype  # what comes before has made it so
    axes = [] if dims is None else [op.Constant(value_ints=list(dims))]
    return op.ReduceProd(x, *axes, keepdims=0)


def body(tensors: Sequence[Any], mask: Any, name: str) -> Sequence[Any]:
    """Stand for ``e2pass::body`` until its branches are built."""
    return _opaque("Body", tensors, mask, name, len(BODIES[name].outputs()))


def body_backward(tangents: Sequence[Any], mask: Any, name: str) -> Sequence[Any]:
    """Stand for ``e2pass::body_backward`` likewise."""
    return _opaque("BodyBackward", tangents, mask, name, len(BODIES[name].gradients()))


def _opaque(kind: str, tensors: Sequence[Any], mask: Any, name: str, outputs: int) -> Sequence[Any]:
    return record(ir.node(kind, [*tensors, mask], {"body": name}, domain=DOMAIN, num_outputs=outputs))


def _call(function: str, *inputs: Any, **attributes: Any) -> Any:
    return record(ir.node(function, inputs, attributes, domain=functions.DOMAIN))[0]


def _own_scale(x: Any, bits: int, axis: int | None) -> Any:
    if axis is None:
        return _call("OwnScale", x, limit=_limit(bits))
    if x.shape is None:
        raise ExportError("a quantizer with a scale for each channel meets a tensor of unknown rank")
    others = op.Constant(value_ints=[d for d in range(len(x.shape)) if d != axis % len(x.shape)])
    return _call("AxisScale", x, others, limit=_limit(bits))


def _rounded_up(scale: Any, power_of_two: bool) -> Any:
    return _call("NextPowerOfTwo", scale) if power_of_two else scale


def _limit(bits: int) -> float:
    return float(2 ** (bits - 1) - 1)


def _code_type(bits: int) -> int:
    return int(ir.DataType.INT8 if ops.code_dtype(bits) == torch.int8 else ir.DataType.INT16)


TABLE: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.e2pass.quantize.default: quantize,
    torch.ops.e2pass.quantize_stochastic.default: quantize_stochastic,
    torch.ops.e2pass.quantize_running.default: quantize_running,
    torch.ops.e2pass.dequantize.default: dequantize,
    torch.ops.e2pass.msb.default: msb,
    torch.ops.e2pass.threshold.default: threshold,
    torch.ops.e2pass.fixed_threshold.default: fixed_threshold,
    torch.ops.e2pass.select.default: select,
    torch.ops.e2pass.sparsify.default: sparsify,
    torch.ops.e2pass.sign.default: sign,
    torch.ops.aten.conv3d.default: conv3d,
    torch.ops.aten.matmul.default: matmul,
    torch.ops.aten.mv.default: matmul,
    torch.ops.prims.prod.default: prod,
    torch.ops.e2pass.body.default: body,
    torch.ops.e2pass.body_backward.default: body_backward,
}
"""Operators to their translations. ``e2pass::agreement`` is not among them: its counts are no part of an export."""
