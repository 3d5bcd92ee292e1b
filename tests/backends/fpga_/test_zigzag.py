"""Import of ZigZag accelerators: figures kept, simplifications noted, what does not fit refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from e2pass.backends.fpga import FpgaCostModel, load_board
from e2pass.backends.fpga.zigzag import import_zigzag
from e2pass.cli import app
from e2pass.errors import BoardError
from tests.backends.fpga_.sites import conv, priced


def memory(size: int, cost: float, width: int, operands: str, served: str = "D1 D2") -> dict[str, Any]:
    ports = [{"name": "rw_port_1", "type": "read_write", "bandwidth_min": 8, "bandwidth_max": width, "allocation": []}]
    return {
        "size": size, "r_cost": cost, "w_cost": cost * 1.5, "area": 0, "latency": 1, "operands": operands.split(),
        "ports": ports, "served_dimensions": served.split(),
    }  # fmt: skip


ACCELERATOR: dict[str, Any] = {
    "name": "Eyeriss_like",
    "memories": {
        "rf_64B": memory(512, 1.0, 8, "I1", ""),
        "sram_8KB": memory(65536, 10.0, 128, "O"),
        "sram_64KB": memory(524288, 20.0, 128, "I2"),
        "dram": memory(10_000_000_000, 1000.0, 64, "I1 I2 O"),
    },
    "operational_array": {"unit_energy": 0.5, "unit_area": 0.1, "dimensions": ["D1", "D2"], "sizes": [14, 12]},
}


def written(tmp_path: Path, **changes: Any) -> Path:
    data = copy.deepcopy(ACCELERATOR)
    for path, value in changes.items():
        place: Any = data
        *way, last = path.split("__")
        for key in way:
            place = place[key]
        place[last] = value
    file = tmp_path / "accelerator.yaml"
    file.write_text(yaml.safe_dump(data), encoding="utf-8")
    return file


def test_figures_are_kept_and_simplifications_noted(tmp_path: Path) -> None:
    imported = import_zigzag(written(tmp_path), 200)
    board = imported.board
    assert (board.name, board.array.rows_pe.value, board.array.columns_pe.value) == ("eyeriss_like", 14, 12)
    assert board.mac(8, 8) == (14 * 12, 0.5)
    assert [m.name for m in board.memory] == ["buffers", "dram"]
    assert board.on_chip.size_bytes.value == (65536 + 524288) / 8
    assert board.on_chip.energy_pj_per_bit.value == pytest.approx(1.25 * (10 * 65536 + 20 * 524288) / 128 / 589824)
    assert board.off_chip.energy_pj_per_bit.value == pytest.approx(1250 / 64)
    assert board.off_chip.bandwidth_gb_per_s.value == pytest.approx(64 / 8 * 0.2)
    text = " ".join(imported.notes)
    for part in (
        "rf_64B: a register",
        "mean of 1000 and 1500",
        "sram_64kb, sram_8kb: memories of single operands",
        "static",
        "vector unit",
    ):
        assert part in text
    assert priced(FpgaCostModel(board).cost(conv(1, 8, 8, 8))).energy_j["static"] == 0


def test_further_dimensions_of_the_array_become_columns(tmp_path: Path) -> None:
    imported = import_zigzag(written(tmp_path, operational_array__sizes=[2, 3, 4]), 200)
    assert (imported.board.array.rows_pe.value, imported.board.array.columns_pe.value) == (2, 12)
    assert "an array of 3 dimensions becomes one of 2 rows and 12 columns" in imported.notes


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"memories__dram__r_cost": None}, "memories.dram.r_cost = None"),
        ({"memories__dram__w_cost": -5000.0}, "energy_pj_per_bit"),
        ({"operational_array__unit_energy": "x"}, "unit_energy = 'x'"),
        ({"memories": {"dram": ACCELERATOR["memories"]["dram"]}}, "on the chip"),
        ({"memories__dram__ports": 3}, "no complete ZigZag accelerator"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path, changes: dict[str, Any], part: str) -> None:
    with pytest.raises(BoardError) as caught:
        import_zigzag(written(tmp_path, **changes), 200)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_command_writes_a_board_that_loads(tmp_path: Path) -> None:
    source, out = str(written(tmp_path)), tmp_path / "board.yaml"
    done = CliRunner().invoke(app, ["boards", "import-zigzag", source, "--clock-mhz", "200", "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert "note: rf_64B" in done.stderr
    assert load_board(out).name == "eyeriss_like"
    printed = CliRunner().invoke(app, ["boards", "import-zigzag", source, "--clock-mhz", "200"])
    assert printed.stdout == out.read_text(encoding="utf-8")
    bad = CliRunner().invoke(app, ["boards", "import-zigzag", source, "--clock-mhz", "0"])
    assert (bad.exit_code, bad.stderr.count("\n")) == (2, 1)
    assert "clock_mhz = 0" in bad.stderr
