"""The contract between the training graph and whatever prices it.

The training graph hands a cost model one ``OpSite`` per operation; the model answers with an ``OpCost``, with
``Free`` (moves no bytes, with the reason) or with ``Unsupported``. Nothing is priced at zero in silence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol


class Phase(StrEnum):
    """Which part of the training step an operation belongs to."""

    DATA = "data"  # the mini-batch: whether it comes at all, and its tensors; costs the device nothing
    FORWARD = "forward"
    LOSS = "loss"
    DX = "dx"  # gradient of an activation, from a convolution or matrix product
    DW = "dw"  # gradient of a weight, from a convolution or matrix product
    BACKWARD = "backward"  # any other operation of the backward half
    UPDATE = "update"


class Technique(StrEnum):
    """Who put the operation there: the model itself, or one of the rewrites."""

    BASE = "base"
    SMD = "smd"
    SLU = "slu"
    BITS = "bits"
    PSG = "psg"


@dataclass(frozen=True)
class TensorSpec:
    """A tensor operand: its shape and the true width of one element in bits (8 for a code, 32 for fp32).

    ``saved`` marks a value of the forward half that the backward half reads: a saved activation.
    """

    shape: tuple[int, ...]
    bits: int = 32
    saved: bool = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> float:
        """Size in bytes at the true width."""
        return self.numel * self.bits / 8


@dataclass(frozen=True)
class OpSite:
    """One operation of the training step, as a cost model sees it.

    Attributes:
        name: Unique name in the training graph, ``region/node``.
        op: Operator, e.g. ``aten.convolution.default`` or ``e2pass.quantize.default``.
        args: Positional arguments in the operator's schema order; tensors are replaced by their ``TensorSpec``,
            lists of tensors by tuples of them; numbers, bools, None and tuples stay as they are.
        kwargs: Keyword arguments, treated alike.
        outputs: The tensors produced; for ``convolution_backward`` those that ``output_mask`` asks for.
        region: Region the node lives in.
        layer: Module path in the user's model, ``""`` where unknown.
        block: Name of the residual block, None outside of any.
        phase: Part of the training step.
        technique: Who put it there.
        probability: Expected executions per nominal step, from 0 to 1.
    """

    name: str
    op: str
    args: tuple[Any, ...]
    outputs: tuple[TensorSpec, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    region: str = ""
    layer: str = ""
    block: str | None = None
    phase: Phase = Phase.FORWARD
    technique: Technique = Technique.BASE
    probability: float = 1.0

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The tensor operands, those inside lists included."""
        found: list[TensorSpec] = []
        for value in (*self.args, *self.kwargs.values()):
            if isinstance(value, TensorSpec):
                found.append(value)
            elif isinstance(value, tuple):
                found.extend(v for v in value if isinstance(v, TensorSpec))
        return tuple(found)


@dataclass(frozen=True)
class OpCost:
    """Modelled cost of one execution of an operation.

    Attributes:
        macs: Multiply-accumulates on the array (``FlopCounterMode`` / 2 for products and convolutions; 0 for
            element-wise work, which is in ``alu_ops``).
        alu_ops: Element-wise operations outside the MAC array.
        cycles: Cycles of the clock of the board, memory stalls included.
        time_s: Seconds: ``cycles`` / clock.
        energy_j: Joules by where they are spent: ``compute``, each memory level by name, ``static``.
        traffic_bytes: Bytes moved by memory level, off-chip level included.
        formula: Short statement of the formula used.
        operand_bytes: ``traffic_bytes`` by memory level and operand: ``x``, ``w`` and ``y`` (or their gradients) for
            convolutions and products, ``read`` and ``write`` for all else.
        saved_write_bytes: Off-chip bytes, part of ``traffic_bytes``, written of values that the backward half reads.
        saved_read_bytes: Likewise read by the backward half of values that the forward half saved.
    """

    macs: float
    alu_ops: float
    cycles: float
    time_s: float
    energy_j: Mapping[str, float]
    traffic_bytes: Mapping[str, float]
    formula: str
    operand_bytes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    saved_write_bytes: float = 0.0
    saved_read_bytes: float = 0.0


@dataclass(frozen=True)
class Free:
    """An operation that moves no bytes and computes nothing, and why (a view, metadata)."""

    reason: str


@dataclass(frozen=True)
class Unsupported:
    """An operation without a formula, and why."""

    reason: str


class CostModel(Protocol):
    """What a backend implements to price a training step."""

    @property
    def name(self) -> str:
        """Name of the board, for headings."""
        ...

    @property
    def dram(self) -> str:
        """Name of the off-chip memory level in ``OpCost.traffic_bytes``."""
        ...

    def cost(self, site: OpSite) -> OpCost | Free | Unsupported:
        """Price one execution of ``site``, whatever its ``probability``."""
        ...

    def sources(self) -> Mapping[str, str]:
        """Every number the model uses, by key, with where it comes from."""
        ...
