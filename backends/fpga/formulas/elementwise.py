"""Element-wise operators: each operand is read once, each result written once, so many operations per element."""

from __future__ import annotations

from e2pass.backends.fpga.formulas.common import (
    ADD,
    DIVIDE,
    EXP,
    LOG,
    MULTIPLY,
    POWER,
    RANDOM,
    RECIPROCAL,
    RSQRT,
    SIGMOID,
    SQRT,
    TANH,
    TRIGONOMETRIC,
    stream,
)
from e2pass.backends.fpga.registry import register_cost
from e2pass.backends.fpga.workload import Alu, Work
from e2pass.cost import OpSite, TensorSpec

GELU = TANH.plus(Alu(2, 5))
SOFTPLUS = EXP.plus(LOG).plus(ADD)


def _each(names: str, alu: Alu) -> dict[str, Alu]:
    return dict.fromkeys(names.split(), alu)


PER_ELEMENT: dict[str, Alu] = {
    **_each("add sub rsub neg abs sign sgn signbit relu threshold threshold_backward maximum minimum", ADD),
    **_each("fmax fmin max.other min.other eq ne lt le gt ge isnan isinf isfinite where masked_fill", ADD),
    **_each("logical_and logical_or logical_not logical_xor round floor ceil trunc frac heaviside", ADD),
    **_each("bitwise_and bitwise_or bitwise_not bitwise_xor clamp_min clamp_max nan_to_num", ADD),
    **_each("bitwise_left_shift bitwise_right_shift __lshift__ __rshift__ hardshrink softshrink", ADD),
    **_each("clamp hardtanh hardtanh_backward hardshrink_backward softshrink_backward", Alu(2, 0)),
    **_each("mul square", MULTIPLY),
    **_each("addcmul leaky_relu leaky_relu_backward _prelu_kernel", Alu(1, 1)),
    **_each("lerp _prelu_kernel_backward", Alu(2, 1)),
    **_each("hardswish hardsigmoid", Alu(3, 2)),
    **_each("hardswish_backward hardsigmoid_backward", Alu(3, 3)),
    **_each("div floor_divide remainder fmod", DIVIDE),
    "addcdiv": DIVIDE.plus(Alu(1, 1)),
    "reciprocal": RECIPROCAL,
    "sqrt": SQRT,
    "rsqrt": RSQRT,
    **_each("exp exp2 expm1", EXP),
    **_each("log log2 log10 log1p", LOG),
    **_each("sin cos tan sinc", TRIGONOMETRIC),
    **_each("asin acos atan sinh cosh asinh acosh atanh", EXP.plus(LOG)),
    "atan2": EXP.plus(LOG).plus(DIVIDE),
    **_each("erf erfc erfinv", EXP.plus(Alu(2, 5))),
    "pow": POWER,
    "xlogy": LOG.plus(MULTIPLY),
    "sigmoid": SIGMOID,
    "sigmoid_backward": Alu(1, 2),
    "tanh": TANH,
    "tanh_backward": Alu(1, 2),
    "silu": SIGMOID.plus(MULTIPLY),
    "silu_backward": SIGMOID.plus(Alu(2, 3)),
    "gelu": GELU,
    "gelu_backward": GELU.plus(Alu(2, 5)),
    **_each("elu celu", EXP.plus(Alu(2, 1))),
    "elu_backward": EXP.plus(Alu(2, 2)),
    "softplus": SOFTPLUS,
    "softplus_backward": SIGMOID.plus(MULTIPLY),
    "mish": SOFTPLUS.plus(TANH).plus(MULTIPLY),
    "mish_backward": SOFTPLUS.plus(TANH).plus(SIGMOID).plus(Alu(2, 4)),
    "log_sigmoid_forward": SOFTPLUS.plus(ADD),
    "log_sigmoid_backward": SIGMOID.plus(Alu(1, 1)),
    "glu": SIGMOID.plus(MULTIPLY),
    "glu_backward": SIGMOID.plus(Alu(2, 4)),
    "native_dropout": RANDOM.plus(Alu(1, 2)),
    "native_dropout_backward": Alu(0, 2),
    # Per element of the hidden state: three sigmoids, two hyperbolic tangents, the four gate sums with biases.
    "_thnn_fused_lstm_cell": SIGMOID.times(3).plus(TANH.times(2)).plus(Alu(13, 3)),
    "_thnn_fused_lstm_cell_backward_impl": TANH.plus(Alu(7, 16)),
    "_thnn_fused_gru_cell": SIGMOID.times(2).plus(TANH).plus(Alu(12, 3)),
    "_thnn_fused_gru_cell_backward": Alu(6, 12),
}
"""Operations per element of the largest result."""

_HIDDEN_FIRST = {"_thnn_fused_lstm_cell", "_thnn_fused_gru_cell"}


@register_cost(*(f"aten.{name}" for name in PER_ELEMENT))
def elementwise(site: OpSite) -> Work:
    """So many operations per element of the largest result."""
    packet, _, overload = site.op.removeprefix("aten.").partition(".")
    key = f"{packet}.{overload}"
    alu = _by_arguments(site, packet) or PER_ELEMENT.get(key) or PER_ELEMENT[_functional(packet)]
    elements = site.outputs[0].numel if packet in _HIDDEN_FIRST else None
    if packet == "_thnn_fused_lstm_cell_backward_impl":
        elements = site.outputs[0].numel // 4  # its first result is the gradient of the four gates
    return stream(site, "element-wise", alu, elements=elements)


def _functional(packet: str) -> str:
    """The name in the table of an operator or of its in-place twin."""
    return packet if packet in PER_ELEMENT else packet.removesuffix("_")


def _by_arguments(site: OpSite, packet: str) -> Alu | None:
    """Cheaper forms that the arguments allow: a constant divisor is a factor, a square one product."""
    other = site.args[1] if len(site.args) > 1 else None
    if isinstance(other, TensorSpec) or not isinstance(other, int | float):
        return None
    if _functional(packet) == "div" and "rounding_mode" not in site.kwargs:
        return MULTIPLY
    if _functional(packet) == "pow":
        return {0.5: SQRT, -0.5: RSQRT, -1: RECIPROCAL, 2: MULTIPLY, 3: MULTIPLY.times(2)}.get(other)
    return None
