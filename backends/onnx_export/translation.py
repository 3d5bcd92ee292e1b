"""The own operators of quantization in standard ONNX operators, and what torch translates wrongly.

The arithmetic is that of ``e2pass.runtime.ops``: symmetric codes, rounding to nearest even, saturation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnxscript import INT8, INT16, opset18

from e2pass.runtime import ops  # registers torch.ops.e2pass

op: Any = opset18


def quantize(x: Any, bits: int, axis: int | None = None) -> tuple[Any, Any]:
    """Translate ``e2pass::quantize``: codes at the scale of the tensor itself, or of each entry along ``axis``."""
    scale = _own_scale(x, bits, axis)
    return _encode(x, scale, bits), scale


def quantize_running(x: Any, bits: int, running: Any) -> tuple[Any, Any]:
    """Translate ``e2pass::quantize_running``: the frozen scale, and while that is 0 (nothing seen) the tensor's own."""
    frozen = op.CastLike(running, x)
    scale = op.Where(op.Equal(frozen, _constant(0.0, x)), _own_scale(x, bits), frozen)
    return _encode(x, scale, bits), scale


def dequantize(codes: Any, scale: Any) -> Any:
    """Translate ``e2pass::dequantize``."""
    return op.Mul(op.CastLike(codes, scale), scale)


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


def _constant(value: float, like: Any) -> Any:
    return op.CastLike(op.Constant(value_float=value), like)


def _limit(bits: int) -> float:
    return float(2 ** (bits - 1) - 1)


def _own_scale(x: Any, bits: int, axis: int | None = None) -> Any:
    if axis is None:
        peak = op.ReduceMax(op.Abs(x), keepdims=0)
    else:
        others = [d for d in range(len(x.shape)) if d != axis]
        peak = op.ReduceMax(op.Abs(x), op.Constant(value_ints=others), keepdims=1)
    # An all-zero tensor has scale 1.
    return op.Where(op.Equal(peak, _constant(0.0, x)), _constant(1.0, x), op.Div(peak, _constant(_limit(bits), x)))


def _encode(x: Any, scale: Any, bits: int) -> Any:
    codes = op.Round(op.Div(x, scale))  # to nearest even, in ONNX as in torch
    codes = op.Clip(codes, _constant(-_limit(bits), x), _constant(_limit(bits), x))
    dtype = INT8.dtype if ops.code_dtype(bits) == torch.int8 else INT16.dtype
    return op.Cast(codes, to=dtype)


TABLE: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.e2pass.quantize.default: quantize,
    torch.ops.e2pass.quantize_running.default: quantize_running,
    torch.ops.e2pass.dequantize.default: dequantize,
    torch.ops.aten.conv3d.default: conv3d,
}
"""For ``custom_translation_table`` of ``torch.onnx.export``: the operators that inference graphs hold."""
