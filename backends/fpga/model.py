"""The cost model: from the work of an operation to cycles, bytes and joules on a board. Modelled, not measured."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property, lru_cache

from e2pass.backends.fpga.board import Board, MacCost, load_board
from e2pass.backends.fpga.mapper import map_product
from e2pass.backends.fpga.registry import lookup
from e2pass.backends.fpga.workload import Product, Reread, Work
from e2pass.cost import Free, OpCost, OpSite, Unsupported

PICO = 1e-12

ASSUMPTIONS: Mapping[str, str] = {
    "calibration": "none: every constant stands in the board description with its source, none is fitted",
    "residency": "no tensor stays on chip from one operation to the next: each operand is read from off-chip memory "
    "and each result written to it",
    "fusion": "no element-wise operation is fused with its neighbour",
    "second pass": "statistics that precede their use (batch norm, quantization) read a tensor twice unless the slice "
    "they are taken over fits into half of the on-chip memory",
    "overlap": "within an operation array, vector unit and memories work at the same time: the slowest decides",
    "utilisation": "the array and the memories reach their stated rates",
    "widths": "operands of 32 bits are fp32, narrower ones integer codes; a pair that the board does not list costs "
    "what the next wider one does",
    "padding": "multiplications with padding zeros are counted, as in FlopCounterMode",
}


class FpgaCostModel:
    """Prices operations on a board; implements ``e2pass.cost.CostModel``.

    The roofline of one operation is ``cycles = max(array, vector unit, each memory)``, with

    * array: ``sum(macs / macs_per_cycle)`` for the operand widths of each product
    * vector unit: ``alu_ops / ops_per_cycle``
    * memory: ``bytes / (bandwidth / clock)``

    Off-chip bytes are those of the mapper for products and one read of each operand plus one write of each result
    for all else. On-chip bytes are the off-chip bytes once more (each is buffered), plus what the units read from and
    write to the buffers: for a product on ``R`` rows and ``C`` columns ``macs/C`` elements of the first operand (it is
    broadcast along the columns), ``macs/R`` of the second and the result once; for element-wise work its operands and
    results. Energy is ``macs * pJ + alu_ops * pJ + bytes * pJ``, plus static and processor power over the time.

    Args:
        board: A description, the name of one that ships, or the path of a YAML file.

    Raises:
        BoardError: If there is no such board or its description is malformed.
    """

    def __init__(self, board: Board | str | os.PathLike[str] = "zedboard") -> None:
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
        return ASSUMPTIONS

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
        """Price ``work``; unsupported if the array has no MAC wide enough for one of its products."""
        rates: list[MacCost] = []
        for product in work.products:
            rate = self._mac(product.a.bits, product.b.bits)
            if rate is None:
                return Unsupported(f"{self.name} has no MAC for operands of {product.a.bits} and {product.b.bits} bits")
            rates.append(rate)
        macs = sum(product.macs for product in work.products)
        traffic, kept = self._traffic(work)
        array_cycles = sum(p.macs / r.macs_per_cycle for p, r in zip(work.products, rates, strict=True))
        vector_cycles = work.alu.total / self.board.vector_unit.ops_per_cycle.value
        memory_cycles = (moved / self._bytes_per_cycle[level] for level, moved in traffic.items())
        cycles = max(array_cycles, vector_cycles, *memory_cycles)
        time_s = cycles / self._clock_hz
        vector = self._vector(work.alu_bits)
        energy = {
            "compute": PICO * sum(p.macs * r.energy_pj for p, r in zip(work.products, rates, strict=True))
            + PICO * (work.alu.adds * vector.add_pj + work.alu.multiplies * vector.multiply_pj)
        }
        for level in self.board.memory:
            energy[level.name] = PICO * 8 * traffic[level.name] * level.energy_pj_per_bit.value
        energy["static"] = self._fixed_w * time_s
        formula = f"{work.formula}; {kept}" if kept else work.formula
        return OpCost(macs, work.alu.total, cycles, time_s, energy, traffic, formula)

    def _traffic(self, work: Work) -> tuple[dict[str, float], str]:
        buffer = self.board.on_chip.size_bytes.value
        again = sum(stream.total_bytes for stream in work.rereads if not _fits(stream, buffer))
        streamed = work.read_bytes + again + work.write_bytes
        off_chip, on_chip = streamed, streamed
        kept: list[str] = []
        for product in work.products:
            mapped = map_product(product, buffer)
            off_chip += mapped.total_bytes
            on_chip += self._array_bytes(product)
            kept.append(mapped.kept)
        traffic = {level.name: 0.0 for level in self.board.memory}
        traffic[self.dram] = off_chip
        traffic[self.board.on_chip.name] = off_chip + on_chip
        return traffic, ", ".join(dict.fromkeys(kept))

    def _array_bytes(self, product: Product) -> float:
        """Bytes between the buffers and the array: operands shared by rows and columns, the result once."""
        rows, columns = self.board.array.rows_pe.value, self.board.array.columns_pe.value
        operands = product.a.bits / columns + product.b.bits / rows
        return product.macs * operands / 8 + product.out.bytes

    @cached_property
    def _clock_hz(self) -> float:
        return self.board.clock_mhz.value * 1e6

    @cached_property
    def _bytes_per_cycle(self) -> dict[str, float]:
        return {m.name: m.bandwidth_gb_per_s.value * 1e9 / self._clock_hz for m in self.board.memory}

    @cached_property
    def _fixed_w(self) -> float:
        return self.board.power.static_w.value + self.board.power.processing_system_w.value


def _fits(stream: Reread, buffer: float) -> bool:
    return stream.slice_bytes <= buffer / 2
