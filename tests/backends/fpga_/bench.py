"""A board with round numbers, so that expected costs can be worked out by hand."""

from __future__ import annotations

import copy
from typing import Any

import yaml

from e2pass.backends.fpga import Board, parse_board


def q(value: float) -> dict[str, Any]:
    return {"value": value, "evidence": "estimate", "source": "made up for a test"}


DESCRIPTION: dict[str, Any] = {
    "schema": "e2pass/board/1",
    "name": "bench",
    "title": "Test board",
    "clock_mhz": q(100),
    "resources": {"dsp_slices": q(100), "luts": q(1000), "flip_flops": q(1000), "bram36_blocks": q(10)},
    "array": {
        "rows_pe": q(10),
        "columns_pe": q(5),
        "accumulator_bits": q(32),
        "macs": [
            {"operand_bits": [8, 8], "macs_per_cycle": q(200), "energy_pj_per_mac": q(1)},
            {"operand_bits": [16, 8], "macs_per_cycle": q(100), "energy_pj_per_mac": q(2)},
            {"operand_bits": [32, 32], "macs_per_cycle": q(50), "energy_pj_per_mac": q(10)},
        ],
    },
    "vector_unit": {
        "ops_per_cycle": q(10),
        "operations": [
            {"operand_bits": 8, "add_pj_per_op": q(0.1), "multiply_pj_per_op": q(0.5)},
            {"operand_bits": 32, "add_pj_per_op": q(1), "multiply_pj_per_op": q(4)},
        ],
    },
    "memory": [
        {
            "name": "sram",
            "size_bytes": q(2000),
            "width_bits": q(8000),
            "transfers_mt_per_s": q(100),
            "bandwidth_gb_per_s": q(100),
            "energy_pj_per_bit": q(0.5),
        },
        {
            "name": "dram",
            "size_bytes": q(1e9),
            "width_bits": q(8000),
            "transfers_mt_per_s": q(100),
            "bandwidth_gb_per_s": q(1),
            "energy_pj_per_bit": q(20),
        },
    ],
    "power": {"static_w": q(0.5), "processing_system_w": q(1.5)},
}


def description(**changes: Any) -> str:
    """The YAML text, with values replaced at paths such as ``memory__1__size_bytes__value``; ``...`` deletes."""
    data = copy.deepcopy(DESCRIPTION)
    for path, value in changes.items():
        keys: list[Any] = [int(key) if key.isdigit() else key for key in path.split("__")]
        place: Any = data
        for key in keys[:-1]:
            place = place[key]
        if value is ...:
            del place[keys[-1]]
        else:
            place[keys[-1]] = value
    return yaml.safe_dump(data)


def bench(**changes: Any) -> Board:
    return parse_board(description(**changes))
