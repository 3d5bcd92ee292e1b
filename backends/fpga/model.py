"""The cost model: from the work of an operation to cycles, bytes and joules on a board. Modelled, not measured."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property, lru_cache
from typing import get_args

from e2pass.backends.fpga.board import Board, MacCost, load_board
from e2pass.backends.fpga.fused import map_fused
from e2pass.backends.fpga.mapper import ArrayShape, Mapped, map_nest
from e2pass.backends.fpga.registry import lookup
from e2pass.backends.fpga.tilings import Goal, Level, Objective
from e2pass.backends.fpga.workload import Product, Work
from e2pass.cost import Free, OpCost, OpSite, Unsupported
from e2pass.errors import ConfigError
from e2pass.report.rooflines import Ceilings

PICO = 1e-12

ASSUMPTIONS: Mapping[str, str] = {
    "calibration": "none: every constant stands in the board description with its source, none is fitted",
    "residency": "no tensor stays on chip from one operation to the next: each operand is read from off-chip memory "
    "and each result written to it",
    "fusion": "no element-wise operation is fused with its neighbour",
    "second pass": "statistics that precede their use (batch norm, quantization) read a tensor twice unless the slice "
    "they are taken over fits into half of the on-chip memory",
    "overlap": "within an operation array, vector unit and memories work at the same time: the slowest decides",
    "utilisation": "the array reaches its stated rate where both output dimensions of a product fill its rows and "
    "columns, and loses what their last row and column leave empty; the memories reach their stated rates",
    "mapping": "each product is tiled under double buffering for least {objective}; a dX computes only where the "
    "forward convolution did, so that strides waste nothing",
    "widths": "operands of 32 bits are fp32, narrower ones integer codes; a pair that the board does not list costs "
    "what the next wider one does",
    "elements": "traffic is counted in elements, not in bursts: a strided convolution fetches the inputs that it uses",
    "padding": "multiplications with padding zeros are counted, as in FlopCounterMode",
}


class FpgaCostModel:
    """Prices operations on a board; implements ``e2pass.cost.CostModel``.

    The roofline of one operation is ``cycles = max(array, vector unit, each memory)``, with

    * array: ``sum(macs / macs_per_cycle)`` for the operand widths of each product
    * vector unit: ``alu_ops / ops_per_cycle``
    * memory: ``bytes / (bandwidth / clock)``

    Bytes of products are those of the mapper (``mapper.py``). All else reads each operand once from off-chip memory and
    writes each result once, and passes every on-chip memory in and out again. Energy is
    ``macs * pJ + alu_ops * pJ + bytes * pJ``, plus static and processor power over the time.

    Args:
        board: A description, the name of one that ships, or the path of a YAML file.
        objective: What the mapper minimises for each product: ``energy`` (that of the fixed power over the time
            included) or ``latency``.

    Raises:
        BoardError: If there is no such board or its description is malformed.
        ConfigError: If the objective is unknown.
    """

    def __init__(self, board: Board | str | os.PathLike[str] = "zedboard", *, objective: Objective = "energy") -> None:
        if objective not in get_args(Objective):
            raise ConfigError(f"objective {objective!r} is not allowed; choose one of {', '.join(get_args(Objective))}")
        self.objective = objective
        self.board = board if isinstance(board, Board) else load_board(board)
        self._mac = lru_cache(maxsize=None)(self.board.mac)
        self._vector = lru_cache(maxsize=None)(self.board.vector)

    @property
    def name(self) -> str:
        """Name of the board."""
        return self.board.name

    @property
    def dram(self) -> str:
        """Name of the off-chip level in ``OpCost.traffic_bytes``."""
        return self.board.off_chip.name

    @property
    def assumptions(self) -> Mapping[str, str]:
        """What the model takes for granted, by topic; for the reports."""
        least = {"energy": "energy", "latency": "time"}[self.objective]
        return {**ASSUMPTIONS, "mapping": ASSUMPTIONS["mapping"].format(objective=least)}

    @property
    def ceilings(self) -> Ceilings:
        """What the board could do at most, for rooflines: the array by operand widths, and the off-chip bandwidth."""
        rates = {f"{a} x {b} bit": self.board.mac(a, b) for a, b in ((32, 32), (8, 16), (8, 8), (4, 10))}
        return Ceilings(
            {name: r.macs_per_cycle * self._clock_hz for name, r in rates.items() if r is not None},
            self.board.off_chip.bandwidth_gb_per_s.value * 1e9,
        )

    def sources(self) -> Mapping[str, str]:
        """Return every number of the board by key: its value, kind of evidence and source."""
        return {key: f"{q.value:g} ({q.evidence}): {q.source}" for key, q in self.board.quantities()}

    def cost(self, site: OpSite) -> OpCost | Free | Unsupported:
        """Price one execution of ``site``, whatever its ``probability``."""
        entry = lookup(site.op)
        if entry is None:
            return Unsupported(f"no formula is registered for {site.op}")
        if isinstance(entry, Free):
            return entry
        try:
            work = entry(site)
        except (TypeError, ValueError, IndexError, KeyError, AttributeError, ArithmeticError) as error:
            return Unsupported(
                f"the formula of {site.op} does not fit these arguments: {type(error).__name__}: {error}"
            )
        return self.price(work) if isinstance(work, Work) else work

    def price(self, work: Work) -> OpCost | Unsupported:
        """Price ``work``; unsupported if a product has no MAC wide enough, or no tile of it fits on the chip."""
        traffic = _Traffic(self.board)
        rates: list[MacCost] = []
        array_cycles = 0.0
        notes: list[str] = []
        for product in work.products:
            rate = self._mac(product.a.bits, product.b.bits)
            if rate is None:
                return Unsupported(f"{self.name} has no MAC for operands of {product.a.bits} and {product.b.bits} bits")
            mapped = self._map(product, rate)
            if mapped is None:
                return Unsupported(f"no tile of {product.nest} fits into the memories of {self.name}")
            rates.append(rate)
            array_cycles += product.macs / (rate.macs_per_cycle * mapped.utilisation)
            traffic.product(product, mapped)
            notes.append(mapped.text)
        traffic.streams(work)
        moved = traffic.by_level()
        vector_cycles = work.alu.total / self.board.vector_unit.ops_per_cycle.value
        memory_cycles = (moved[level.name] / level.bytes_per_cycle for level in self._levels)
        cycles = max(array_cycles, vector_cycles, *memory_cycles)
        time_s = cycles / self._clock_hz
        vector = self._vector(work.alu_bits)
        energy = {
            "compute": PICO * sum(p.macs * r.energy_pj for p, r in zip(work.products, rates, strict=True))
            + PICO * (work.alu.adds * vector.add_pj + work.alu.multiplies * vector.multiply_pj)
        }
        for level in self._levels:
            energy[level.name] = PICO * moved[level.name] * level.pj_per_byte
        energy["static"] = self._fixed_w * time_s
        return OpCost(
            sum(product.macs for product in work.products),
            work.alu.total,
            cycles,
            time_s,
            energy,
            moved,
            "; ".join([work.formula, *dict.fromkeys(notes)]),
            traffic.by_operand(),
            work.saved_write_bytes + traffic.saved_written,
            work.saved_read_bytes + traffic.saved_read,
        )

    def map(self, product: Product) -> Mapped | None:
        """Return the mapping of a product; None if no tile of it fits, or no MAC is wide enough."""
        rate = self._mac(product.a.bits, product.b.bits)
        return None if rate is None else self._map(product, rate)

    def _map(self, product: Product, rate: MacCost) -> Mapped | None:
        if product.nest is None:
            return map_fused(product, self._levels, self._shape)
        return map_nest(product.nest, self._levels, self._shape, rate.macs_per_cycle, self._goal)

    @cached_property
    def _levels(self) -> tuple[Level, ...]:
        return tuple(
            Level(
                m.name,
                m.size_bytes.value,
                m.bandwidth_gb_per_s.value * 1e9 / self._clock_hz,
                8 * m.energy_pj_per_bit.value,
            )
            for m in self.board.memory
        )

    @cached_property
    def _shape(self) -> ArrayShape:
        array = self.board.array
        return ArrayShape(int(array.rows_pe.value), int(array.columns_pe.value), int(array.accumulator_bits.value))

    @cached_property
    def _goal(self) -> Goal:
        return Goal(self.objective, self._fixed_w / self._clock_hz / PICO)

    @cached_property
    def _clock_hz(self) -> float:
        return self.board.clock_mhz.value * 1e6

    @cached_property
    def _fixed_w(self) -> float:
        return self.board.power.static_w.value + self.board.power.processing_system_w.value


class _Traffic:
    """Adds up what the parts of an operation move, by memory and operand."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self.levels = [level.name for level in board.memory]
        self.moved: dict[str, dict[str, float]] = {name: {} for name in self.levels}
        self.saved_written = self.saved_read = 0.0

    def product(self, product: Product, mapped: Mapped) -> None:
        """What the mapper decided."""
        off_chip: Mapping[str, float] = mapped.traffic_bytes[self.levels[-1]]
        for level, operands in mapped.traffic_bytes.items():
            for operand, amount in operands.items():
                self._add(level, operand, amount)
        names = ("a", "b", "out") if product.nest is None else (*product.nest.reads, product.nest.writes)
        for tensor, name in zip((product.a, product.b), names, strict=False):
            self.saved_read += off_chip[name] if tensor.saved else 0.0
        self.saved_written += product.out.bytes if product.out.saved else 0.0

    def streams(self, work: Work) -> None:
        """All else passes every memory on the way to the vector unit and back."""
        again = [r for r in work.rereads if r.slice_bytes > self.board.on_chip.size_bytes.value / 2]
        self.saved_read += sum(r.total_bytes for r in again if r.saved)
        read = work.read_bytes + sum(r.total_bytes for r in again)
        for level in self.levels:
            passes = 1 if level == self.levels[-1] else 2
            self._add(level, "read", passes * read)
            self._add(level, "write", passes * work.write_bytes)

    def by_level(self) -> dict[str, float]:
        return {level: sum(operands.values()) for level, operands in self.moved.items()}

    def by_operand(self) -> dict[str, dict[str, float]]:
        return {level: {k: v for k, v in operands.items() if v} for level, operands in self.moved.items()}

    def _add(self, level: str, operand: str, amount: float) -> None:
        self.moved[level][operand] = self.moved[level].get(operand, 0.0) + amount
