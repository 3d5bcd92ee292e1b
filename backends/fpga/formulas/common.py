"""What the formulas share: operand access, and the operations that one transcendental function takes."""

from __future__ import annotations

from collections.abc import Iterable

from e2pass.backends.fpga.workload import NO_ALU, Alu, Reread, Work
from e2pass.cost import OpSite, TensorSpec

# Estimates of the additions and multiplications behind one function value: exponential and logarithm by range
# reduction and a polynomial of degree 4, reciprocal and reciprocal root by two Newton steps from a table.
ADD = Alu(1, 0)
MULTIPLY = Alu(0, 1)
EXP = Alu(4, 4)
LOG = Alu(4, 4)
RECIPROCAL = Alu(2, 4)
RSQRT = Alu(2, 6)
DIVIDE = RECIPROCAL.plus(MULTIPLY)
SQRT = RSQRT.plus(MULTIPLY)
POWER = LOG.plus(EXP).plus(MULTIPLY)
SIGMOID = EXP.plus(ADD).plus(RECIPROCAL)
TANH = SIGMOID.plus(Alu(1, 1))
TRIGONOMETRIC = EXP
RANDOM = Alu(6, 0)
"""One random number: three shifts and three exclusive-ors."""


def tensor(site: OpSite, index: int) -> TensorSpec:
    """Return positional argument ``index``, which must be a tensor."""
    value = site.args[index]
    if not isinstance(value, TensorSpec):
        raise TypeError(f"argument {index} is {value!r}, not a tensor")
    return value


def size(tensors: Iterable[TensorSpec]) -> float:
    """Return the bytes of all ``tensors``."""
    return sum(t.bytes for t in tensors)


def saved(tensors: Iterable[TensorSpec]) -> float:
    """Return the bytes of those among ``tensors`` that the forward half saves for the backward half."""
    return size(t for t in tensors if t.saved)


def width(*tensors: TensorSpec) -> int:
    """Return the width of element-wise work on ``tensors``: that of the widest, at most 32 bits."""
    return min(32, max((t.bits for t in tensors), default=32))


def arguments(site: OpSite, start: int = 0) -> tuple[TensorSpec, ...]:
    """Return the tensors among the positional arguments from ``start`` on, lists of tensors included."""
    return OpSite(site.name, site.op, site.args[start:], ()).inputs


def stream(
    site: OpSite,
    formula: str,
    per_element: Alu = NO_ALU,
    *,
    elements: float | None = None,
    reads: Iterable[TensorSpec] | None = None,
    writes: Iterable[TensorSpec] | None = None,
    rereads: tuple[Reread, ...] = (),
) -> Work:
    """Return the work of a pass that reads each operand once and writes each result once.

    Args:
        site: The operation.
        formula: Statement for reports.
        per_element: Operations of the vector unit per element.
        elements: How many elements; those of the largest result by default.
        reads: Tensors read; all operands by default.
        writes: Tensors written; all results by default.
        rereads: Streams that may have to be read twice.
    """
    read = site.inputs if reads is None else tuple(reads)
    written = site.outputs if writes is None else tuple(writes)
    count = max((t.numel for t in site.outputs), default=0) if elements is None else elements
    return Work(
        formula,
        read_bytes=size(read),
        write_bytes=size(written),
        saved_read_bytes=saved(read),
        saved_write_bytes=saved(written),
        rereads=rereads,
        alu=per_element.times(count),
        alu_bits=width(*read, *written),
    )
