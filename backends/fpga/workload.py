"""What an operation asks of a machine, whatever the machine: products for the array, passes for the vector unit.

A formula turns an ``OpSite`` into a ``Work``; the cost model turns the ``Work`` into cycles, bytes and joules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from e2pass.backends.fpga.nest import Nest
from e2pass.cost import TensorSpec


class Alu(NamedTuple):
    """Element-wise operations: additions (comparisons, shifts and logic among them) and multiplications."""

    adds: float = 0.0
    multiplies: float = 0.0

    def times(self, count: float) -> Alu:
        """Return the operations of ``count`` repetitions."""
        return Alu(self.adds * count, self.multiplies * count)

    def plus(self, other: Alu) -> Alu:
        """Return the operations of both."""
        return Alu(self.adds + other.adds, self.multiplies + other.multiplies)

    @property
    def total(self) -> float:
        """Additions and multiplications together."""
        return self.adds + self.multiplies


NO_ALU = Alu()


@dataclass(frozen=True)
class Product:
    """A convolution or (batch of) matrix products on the array.

    Attributes:
        macs: Multiply-accumulates in all.
        a: First operand, all batches together.
        b: Second operand.
        out: Result.
        batches: Independent products that it consists of, each with an equal share of the operands.
        nest: Its loops, for the mapper; None for fused products, which are mapped by closed form (``fused.py``).
    """

    macs: float
    a: TensorSpec
    b: TensorSpec
    out: TensorSpec
    batches: int = 1
    nest: Nest | None = None

    @classmethod
    def of(cls, nest: Nest, a: TensorSpec, b: TensorSpec, out: TensorSpec) -> Product:
        """The product that a nest describes; ``a`` and ``b`` in the order of ``nest.reads``."""
        return cls(nest.macs, a, b, out, nest.g, nest)


class Reread(NamedTuple):
    """A stream that must be read a second time unless one independent slice of it fits on the chip.

    Batch norm needs the mean of a channel before it can normalise it: if the channel fits, it is read once.
    """

    total_bytes: float
    slice_bytes: float
    saved: bool = False


@dataclass(frozen=True)
class Work:
    """All that one execution of an operation asks for.

    Attributes:
        formula: Short statement of the formula, for reports.
        products: Work for the array; their operands and results move as the mapper decides.
        read_bytes: Bytes of all other operands, each read once.
        write_bytes: Bytes of all other results, each written once.
        saved_read_bytes: The part of ``read_bytes`` that was saved by the forward half.
        saved_write_bytes: The part of ``write_bytes`` that is saved for the backward half.
        rereads: Streams that may have to be read twice.
        alu: Work for the vector unit.
        alu_bits: Width of its operands.
    """

    formula: str
    products: tuple[Product, ...] = ()
    read_bytes: float = 0.0
    write_bytes: float = 0.0
    saved_read_bytes: float = 0.0
    saved_write_bytes: float = 0.0
    rereads: tuple[Reread, ...] = ()
    alu: Alu = NO_ALU
    alu_bits: int = 32
