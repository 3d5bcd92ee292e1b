"""Import of a ZigZag accelerator file (github.com/KULeuven-MICAS/zigzag) as a board description.

ZigZag describes an array and memories, but no clock, no vector unit, no static power and one MAC energy for all widths.
What it lacks comes from the caller or is marked as an estimate in the result, and each simplification is a note.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from e2pass.backends.fpga.board import Board, load_board, parse_board
from e2pass.errors import BoardError

OPERANDS = {"I1", "I2", "O"}


class Imported(NamedTuple):
    """A board description as YAML text, the board it is, and what was simplified on the way."""

    text: str
    board: Board
    notes: tuple[str, ...]


class _Memory(NamedTuple):
    name: str
    size_bits: int
    width_bits: int
    pj_per_bit: float
    operands: frozenset[str]


def import_zigzag(path: str | os.PathLike[str], clock_mhz: float) -> Imported:
    """Read a ZigZag accelerator.

    Args:
        path: The accelerator's YAML file.
        clock_mhz: Clock, which ZigZag does not state, in MHz.

    Raises:
        BoardError: If the file is no ZigZag accelerator, or has something that a board cannot express.
    """
    file = Path(path)
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BoardError(f"{file} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict) or not {"memories", "operational_array"} <= data.keys():
        raise BoardError(f"{file} is no ZigZag accelerator: it lacks the keys memories and operational_array")
    notes: list[str] = []
    try:
        document = _document(data, file, clock_mhz, notes)
    except BoardError:
        raise
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise BoardError(f"{file} is no complete ZigZag accelerator: {type(error).__name__} {error}") from None
    text = yaml.safe_dump(document, sort_keys=False, width=120, allow_unicode=True)
    return Imported(text, parse_board(text, str(file)), tuple(notes))


def _document(data: dict[str, Any], file: Path, clock_mhz: float, notes: list[str]) -> dict[str, Any]:
    name = re.sub(r"[^a-z0-9_-]+", "-", str(data.get("name", file.stem)).lower()).strip("-_") or "imported"
    array = data["operational_array"]
    rows, columns = _sizes(array, notes)
    origin = f"ZigZag accelerator file {file.name}"
    energy = _number(array.get("unit_energy"), f"{file}: operational_array.unit_energy")
    notes.append("one MAC energy and rate for all operand widths, as in ZigZag")
    notes.append("vector unit: energies of the ZedBoard's description; ZigZag prices no element-wise work")
    notes.append("static and processor power: 0, ZigZag has none")
    vector = load_board("zedboard").model_dump(by_alias=True)["vector_unit"]
    vector["ops_per_cycle"] = _q(
        columns, "estimate", "as many lanes as the array has columns: ZigZag has no vector unit"
    )
    return {
        "schema": "e2pass/board/1",
        "name": name,
        "title": f"{data.get('name', name)}, imported from ZigZag",
        "clock_mhz": _q(clock_mhz, "estimate", "given at the import: ZigZag counts cycles"),
        "array": {
            "rows_pe": _q(rows, "literature", f"{origin}: operational_array.sizes"),
            "columns_pe": _q(columns, "literature", f"{origin}: operational_array.sizes"),
            "accumulator_bits": _q(32, "estimate", "ZigZag states it with each layer, not with the accelerator"),
            "macs": [
                {
                    "operand_bits": [32, 32],
                    "macs_per_cycle": _q(rows * columns, "literature", f"{origin}: operational_array.sizes"),
                    "energy_pj_per_mac": _q(energy, "literature", f"{origin}: operational_array.unit_energy"),
                }
            ],
        },
        "vector_unit": vector,
        "memory": [_level(m, clock_mhz, origin) for m in _levels(_memories(data, file, notes), file, notes)],
        "power": {
            "static_w": _q(0, "estimate", "left out: ZigZag models dynamic energy only"),
            "processing_system_w": _q(0, "estimate", "left out: ZigZag models dynamic energy only"),
        },
    }


def _sizes(array: dict[str, Any], notes: list[str]) -> tuple[int, int]:
    rows, *others = [int(size) for size in array["sizes"]]
    columns = math.prod(others)
    if len(others) > 1:
        notes.append(f"an array of {len(others) + 1} dimensions becomes one of {rows} rows and {columns} columns")
    return rows, columns


def _memories(data: dict[str, Any], file: Path, notes: list[str]) -> list[_Memory]:
    """The memories that the array shares, from the inside out; registers of single elements are left out."""
    found = []
    for name, memory in data["memories"].items():
        if not memory["served_dimensions"]:
            notes.append(f"{name}: a register in each element, part of the energy of a MAC here")
            continue
        where = f"{file}: memories.{name}"
        width = max(int(port["bandwidth_max"]) for port in memory["ports"])
        costs = [_number(memory.get(key), f"{where}.{key}") for key in ("r_cost", "w_cost")]
        if costs[0] != costs[1]:
            notes.append(f"{name}: one energy for reads and writes, the mean of {costs[0]:g} and {costs[1]:g} pJ")
        label = re.sub(r"[^a-z0-9_]+", "_", str(name).lower()).strip("_").lstrip("_0123456789") or "memory"
        found.append(
            _Memory(label, int(memory["size"]), width, sum(costs) / 2 / width, frozenset(memory["operands"]))
        )  # fmt: skip
    return found


def _levels(memories: list[_Memory], file: Path, notes: list[str]) -> list[_Memory]:
    """Memories that hold all operands are levels; those on the chip that hold some of them become one."""
    levels = [m for m in memories if m.operands == OPERANDS]
    partial = [m for m in memories if m.operands != OPERANDS]
    if not levels or len(levels) + bool(partial) < 2:
        raise BoardError(
            f"{file}: a board needs a memory on the chip and one off it that hold {', '.join(sorted(OPERANDS))}"
        )
    if partial:
        size = sum(m.size_bits for m in partial)
        mean = sum(m.pj_per_bit * m.size_bits for m in partial) / size
        names = ", ".join(m.name for m in partial)
        notes.append(f"{names}: memories of single operands become one, at their mean energy per bit weighted by size")
        every = _Memory("buffers", size, sum(m.width_bits for m in partial), mean, frozenset(OPERANDS))
        levels.append(every)
    return sorted(levels, key=lambda m: m.size_bits)


def _level(memory: _Memory, clock_mhz: float, origin: str) -> dict[str, Any]:
    source = f"{origin}: memories, {memory.name}"
    return {
        "name": memory.name,
        "size_bytes": _q(memory.size_bits / 8, "literature", f"{source}, size"),
        "width_bits": _q(memory.width_bits, "literature", f"{source}, bandwidth_max"),
        "transfers_mt_per_s": _q(clock_mhz, "estimate", "one transfer in each cycle, as in ZigZag"),
        "bandwidth_gb_per_s": _q(memory.width_bits * clock_mhz / 8e3, "literature", f"{source}, bandwidth_max x clock"),
        "energy_pj_per_bit": _q(
            memory.pj_per_bit, "literature", f"{source}, mean of r_cost and w_cost / bandwidth_max"
        ),
    }


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BoardError(f"{where} = {value!r} is not allowed: give a number of pJ (CACTI is not run here)")
    return float(value)


def _q(value: float, evidence: str, source: str) -> dict[str, Any]:
    return {"value": float(value), "evidence": evidence, "source": source}
