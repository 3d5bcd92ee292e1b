"""The own operators as ONNX functions made of standard operators; a file holds those it uses.

The arithmetic is that of ``e2pass.runtime.ops``: symmetric codes, rounding to nearest even, saturation.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import onnx.parser
import onnx_ir as ir

DOMAIN = "e2pass"
OPSET = 18
"""Version of the standard operators that every export uses."""

_FIT = """
        zero_ = Constant <value_float = 0.0> ()
        one_ = Constant <value_float = 1.0> ()
        zero = CastLike(zero_, x)
        one = CastLike(one_, x)
        limit_ = Constant <value_float: float = @limit> ()
        most = CastLike(limit_, x)
        fitting = Div(peak, most)
        nothing = Equal(fitting, zero)
        finite = Where(nothing, one, fitting)
        endless = IsInf(peak)
        nan = Div(zero, zero)
        scale = Where(endless, nan, finite)
"""
"""The scale at which ``peak`` has the code ``limit``: 1 where all values are zero, NaN where one is infinite."""

_POWERS = ", ".join(repr(2.0**exponent) for exponent in range(-126, 128))
"""The normal powers of two of float32: looked up, since no operator takes a number apart, and logarithms round."""

_TEXTS = (
    f"""
    OwnScale <limit: float> (x) => (scale) {{
        magnitude = Abs(x)
        peak = ReduceMax <keepdims = 0> (magnitude)
        {_FIT}
    }}
    """,
    f"""
    AxisScale <limit: float> (x, others) => (scale) {{
        magnitude = Abs(x)
        peak = ReduceMax <keepdims = 1> (magnitude, others)
        {_FIT}
    }}
    """,
    """
    RunningScale <limit: float> (x, running) => (scale) {
        zero_ = Constant <value_float = 0.0> ()
        frozen = CastLike(running, x)
        zero = CastLike(zero_, x)
        unseen = Equal(frozen, zero)
        own = e2pass.OwnScale <limit: float = @limit> (x)
        scale = Where(unseen, own, frozen)
    }
    """,
    f"""
    NextPowerOfTwo (scale) => (power) {{
        powers_ = Constant <value_floats = [{_POWERS}]> ()
        powers = CastLike(powers_, scale)
        last = Constant <value_ints = [-1]> ()
        column = Unsqueeze(scale, last)
        enough = GreaterOrEqual(powers, column)
        zero_ = Constant <value_float = 0.0> ()
        zero = CastLike(zero_, scale)
        one_ = Constant <value_float = 1.0> ()
        one = CastLike(one_, scale)
        endless = Div(one, zero)
        candidates = Where(enough, powers, endless)
        least = ReduceMin <keepdims = 0> (candidates, last)
        nothing = Sub(scale, scale)
        power = Add(least, nothing)
    }}
    """,
    """
    Encode <limit: float, to: int> (x, scale) => (codes) {
        limit_ = Constant <value_float: float = @limit> ()
        most = CastLike(limit_, x)
        least = Neg(most)
        ratio = Div(x, scale)
        nearest = Round(ratio)
        kept = Clip(nearest, least, most)
        codes = Cast <to: int = @to> (kept)
    }
    """,
    """
    EncodeRandomly <limit: float, to: int> (x, scale) => (codes) {
        limit_ = Constant <value_float: float = @limit> ()
        most = CastLike(limit_, x)
        least = Neg(most)
        ratio = Div(x, scale)
        noise = RandomUniformLike <low = 0.0, high = 1.0> (x)
        above = Add(ratio, noise)
        rounded = Floor(above)
        kept = Clip(rounded, least, most)
        codes = Cast <to: int = @to> (kept)
    }
    """,
    """
    Dequantize (codes, scale) => (values) {
        numbers = CastLike(codes, scale)
        values = Mul(numbers, scale)
    }
    """,
    """
    MostSignificant <step: float, limit: float, to: int> (codes, scale) => (high, coarse) {
        step_ = Constant <value_float: float = @step> ()
        half = Constant <value_float = 0.5> ()
        most = Constant <value_float: float = @limit> ()
        numbers = Cast <to = 1> (codes)
        ratio = Div(numbers, step_)
        above = Add(ratio, half)
        rounded = Floor(above)
        kept = Min(rounded, most)
        high = Cast <to: int = @to> (kept)
        by = CastLike(step_, scale)
        coarse = Mul(scale, by)
    }
    """,
    """
    MostSignificantFloor <step: float, limit: float, to: int> (codes, scale) => (high, coarse) {
        step_ = Constant <value_float: float = @step> ()
        numbers = Cast <to = 1> (codes)
        ratio = Div(numbers, step_)
        rounded = Floor(ratio)
        high = Cast <to: int = @to> (rounded)
        by = CastLike(step_, scale)
        coarse = Mul(scale, by)
    }
    """,
    """
    MostSignificantTruncate <step: float, limit: float, to: int> (codes, scale) => (high, coarse) {
        step_ = Constant <value_float: float = @step> ()
        numbers = Cast <to = 1> (codes)
        magnitude = Abs(numbers)
        ratio = Div(magnitude, step_)
        rounded = Floor(ratio)
        side = Sign(numbers)
        signed = Mul(rounded, side)
        high = Cast <to: int = @to> (signed)
        by = CastLike(step_, scale)
        coarse = Mul(scale, by)
    }
    """,
    """
    Threshold <beta: float> (gradient) => (tau) {
        magnitude = Abs(gradient)
        peak = ReduceMax <keepdims = 0> (magnitude)
        beta_ = Constant <value_float: float = @beta> ()
        share = CastLike(beta_, gradient)
        tau = Mul(peak, share)
    }
    """,
    """
    Select (predicted, full, tau) => (chosen) {
        magnitude = Abs(predicted)
        sure = GreaterOrEqual(magnitude, tau)
        chosen = Where(sure, predicted, full)
    }
    """,
    """
    Sparsify (predicted, tau) => (chosen) {
        magnitude = Abs(predicted)
        unsure = Less(magnitude, tau)
        zero_ = Constant <value_float = 0.0> ()
        zero = CastLike(zero_, predicted)
        chosen = Where(unsure, zero, predicted)
    }
    """,
    """
    Sign (gradient) => (side) {
        lost = IsNaN(gradient)
        plain = Sign(gradient)
        side = Where(lost, gradient, plain)
    }
    """,
)


@functools.cache
def _library() -> Mapping[str, onnx.FunctionProto]:
    head = f'<opset_import: ["": {OPSET}, "{DOMAIN}": 1], domain: "{DOMAIN}">'
    parsed = [onnx.parser.parse_function(f"{head} {text}") for text in _TEXTS]
    return {function.name: function for function in parsed}


def add_functions(model: ir.Model) -> None:
    """Add to a model the functions that it calls, directly or in functions and branches."""
    pending: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    while pending:
        for node in ir.traversal.RecursiveGraphIterator(pending.pop()):
            if node.domain == DOMAIN and (DOMAIN, node.op_type, "") not in model.functions:
                function = ir.serde.deserialize_function(_library()[node.op_type])
                model.functions[function.identifier()] = function
                pending.append(function)
