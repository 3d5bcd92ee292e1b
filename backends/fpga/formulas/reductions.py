"""Reductions, scans, softmax and sorting."""

from __future__ import annotations

import math

from e2pass.backends.fpga.formulas.common import ADD, EXP, LOG, MULTIPLY, SQRT, stream, tensor
from e2pass.backends.fpga.registry import register_cost
from e2pass.backends.fpga.workload import Alu, Reread, Work
from e2pass.cost import OpSite, TensorSpec


def _each(names: str, alu: Alu) -> dict[str, Alu]:
    return dict.fromkeys(names.split(), alu)


PER_INPUT: dict[str, Alu] = {
    **_each("sum mean nansum amax amin max min aminmax argmax argmin any all count_nonzero cumsum cummax cummin", ADD),
    **_each("prod cumprod", MULTIPLY),
    **_each("var std var_mean std_mean", Alu(2, 1)),
    **_each("linalg_vector_norm norm", Alu(1, 1)),
    "logsumexp": EXP.plus(Alu(3, 0)),
    "logcumsumexp": EXP.plus(LOG).plus(Alu(3, 0)),
}
"""Operations per element of the input."""

PER_RESULT: dict[str, Alu] = {
    "mean": MULTIPLY,
    "logsumexp": LOG,
    **_each("std std_mean linalg_vector_norm norm", SQRT),
}
"""Operations per element of the result, on top."""


@register_cost(*(f"aten.{name}" for name in PER_INPUT), "e2pass.mean", "e2pass.sum")
def reduction(site: OpSite) -> Work:
    """So many operations per input element, and those that finish each result."""
    name = site.op.split(".")[1]
    x = tensor(site, 0)
    alu = PER_INPUT[name].times(x.numel).plus(PER_RESULT.get(name, Alu()).times(site.outputs[0].numel))
    return stream(site, "reduction: per input element", alu, elements=1)


@register_cost("aten._softmax", "aten._safe_softmax")
def softmax(site: OpSite) -> Work:
    """Maximum, difference, exponential, sum and scaling per element; a row is read twice unless it fits."""
    x = tensor(site, 0)
    return stream(site, "softmax", EXP.plus(Alu(3, 1)), rereads=_rows(x, site.args[1], x))


@register_cost("aten._log_softmax")
def log_softmax(site: OpSite) -> Work:
    """Maximum, difference, exponential, sum and difference per element."""
    x = tensor(site, 0)
    return stream(site, "log softmax", EXP.plus(Alu(4, 0)), rereads=_rows(x, site.args[1], x))


@register_cost("aten._softmax_backward_data")
def softmax_backward(site: OpSite) -> Work:
    """``(g - sum(g * y)) * y``."""
    gy, y = tensor(site, 0), tensor(site, 1)
    return stream(site, "softmax backward", Alu(2, 2), rereads=_rows(y, site.args[2], gy, y))


@register_cost("aten._log_softmax_backward_data")
def log_softmax_backward(site: OpSite) -> Work:
    """``g - exp(y) * sum(g)``."""
    gy, y = tensor(site, 0), tensor(site, 1)
    return stream(site, "log softmax backward", EXP.plus(Alu(2, 1)), rereads=_rows(y, site.args[2], gy, y))


@register_cost("aten.topk", "aten.sort", "aten.argsort", "aten.median", "aten.kthvalue")
def sort(site: OpSite) -> Work:
    """``n log2 n`` comparisons per row of ``n`` (the last dimension)."""
    x = tensor(site, 0)
    row = max(2, x.shape[-1] if x.shape else 1)
    return stream(site, "sort: n*log2(n) comparisons", Alu(math.log2(row), 0), elements=x.numel)


def _rows(shaped: TensorSpec, dim: int, *streams: TensorSpec) -> tuple[Reread, ...]:
    length = shaped.shape[dim] if shaped.shape else 1
    row = sum(length * s.bits / 8 for s in streams)
    return tuple(Reread(s.bytes, row, s.saved) for s in streams)
