from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from e2pass.backends.fpga import list_boards, load_board, parse_board
from e2pass.errors import BoardError
from tests.backends.fpga_.bench import bench, description, q


@pytest.mark.parametrize("name", list_boards())
def test_every_shipped_board_loads_under_its_own_name(name: str) -> None:
    assert load_board(name).name == name


@pytest.mark.parametrize("name", list_boards())
def test_every_number_of_a_shipped_board_has_evidence_and_source(name: str) -> None:
    found = dict(load_board(name).quantities())
    off_chip = f"memory[{load_board(name).off_chip.name}].bandwidth_gb_per_s"
    assert {"clock_mhz", "power.static_w", off_chip, "array.macs[8x16].macs_per_cycle"} <= {*found}
    for key, quantity in found.items():
        assert len(quantity.source.split()) >= 2, f"{key} has no source to speak of"


def test_zedboard_lists_the_widths_of_the_paper() -> None:
    pairs = {tuple(rate.operand_bits) for rate in load_board("zedboard").array.macs}
    assert {(8, 8), (8, 16), (4, 10), (16, 16), (32, 32)} <= pairs


@pytest.mark.parametrize("name", list_boards())
def test_mac_energies_follow_the_stated_closed_form(name: str) -> None:
    """qkeras: mult(b) = 0.0029948 b^2 + 0.0010417 b, with a*b for b^2; plus a 32-bit integer add of 0.1 pJ."""
    for rate in load_board(name).array.macs:
        a, b = rate.operand_bits
        integer = 0.0029948 * a * b + 0.0010417 * (a * b) ** 0.5 + 0.1
        expected = 3.7 + 0.9 if (a, b) == (32, 32) else integer
        assert rate.energy_pj_per_mac.value == pytest.approx(expected, rel=5e-3)


def test_the_three_boards_ship() -> None:
    assert {"zedboard", "zcu102", "asic45"} <= {*list_boards()}
    assert load_board("asic45").resources is None


@pytest.mark.parametrize("name", ["zedboard", "zcu102"])
def test_a_design_is_within_its_fabric(name: str) -> None:
    board = load_board(name)
    assert board.resources is not None
    assert board.array.rows_pe.value * board.array.columns_pe.value <= board.resources.dsp_slices.value
    assert board.on_chip.size_bytes.value == board.resources.bram36_blocks.value * 4096


def test_a_board_file_loads(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(description(), encoding="utf-8")
    assert load_board(path).name == load_board(str(path)).name == "bench"


@pytest.mark.parametrize("board", ["zedbored", "no/such/file.yaml", "", ".", "setup.cfg"])
def test_an_unknown_board_error_lists_the_boards(board: str) -> None:
    with pytest.raises(BoardError, match="zedboard"):
        load_board(board)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BoardError, match=r"b\.yaml"):
        load_board(tmp_path / "b.yaml")


MALFORMED: list[tuple[dict[str, Any], list[str]]] = [
    # an unknown key, among them a wrong unit: the valid keys are named
    ({"clock_ghz": q(0.1)}, ["clock_ghz", "clock_mhz"]),
    ({"memory__1__energy_nj_per_bit": q(1)}, ["memory.1.energy_nj_per_bit", "energy_pj_per_bit"]),
    ({"power__static_w__unit": "mW"}, ["power.static_w.unit", "'mW'", "value, evidence, source"]),
    # out of bounds: key, value, range
    ({"clock_mhz": q(0)}, ["clock_mhz", "= 0 ", "1 to 5000 MHz"]),
    ({"clock_mhz": q(1e8)}, ["clock_mhz", "1e+08", "1 to 5000 MHz"]),
    ({"memory__1__energy_pj_per_bit": q(-20)}, ["memory.1.energy_pj_per_bit", "-20", "0.0001 to 500 pJ per bit"]),
    ({"memory__1__energy_pj_per_bit": q(1.6e17)}, ["memory.1.energy_pj_per_bit", "1.6e+17", "0.0001 to 500 pJ"]),
    ({"array__macs__0__energy_pj_per_mac": q(-1)}, ["array.macs.0.energy_pj_per_mac", "-1", "0.001 to 1000 pJ"]),
    ({"array__macs__0__operand_bits": [8, 128]}, ["array.macs.0.operand_bits.1", "128", "64"]),
    ({"array__macs__0__operand_bits": [8]}, ["array.macs.0.operand_bits", "[8]", "2"]),
    ({"power__static_w": q(-0.1)}, ["power.static_w", "-0.1", "0 to 500 W"]),
    # the wrong type: key, value, and the range where there is one
    ({"clock_mhz": 100}, ["clock_mhz", "100", "value", "evidence", "source", "1 to 5000 MHz"]),
    ({"clock_mhz__value": "100 MHz"}, ["clock_mhz.value", "'100 MHz'", "1 to 5000 MHz"]),
    ({"clock_mhz__value": True}, ["clock_mhz.value", "True"]),
    ({"clock_mhz__value": float("nan")}, ["clock_mhz.value", "nan"]),
    ({"clock_mhz__value": float("inf")}, ["clock_mhz.value", "inf"]),
    ({"clock_mhz__evidence": "hearsay"}, ["clock_mhz.evidence", "hearsay", "data sheet", "literature", "estimate"]),
    ({"clock_mhz__source": ""}, ["clock_mhz.source", "''"]),
    ({"schema": "e2pass/board/99"}, ["schema", "e2pass/board/99", "e2pass/board/1"]),
    ({"name": "Zed Board"}, ["name", "Zed Board"]),
    # something is missing
    ({"power__static_w": ...}, ["power.static_w is missing", "0 to 500 W"]),
    ({"clock_mhz__source": ...}, ["clock_mhz.source is missing"]),
    ({"memory__1": ...}, ["memory lists 1 levels", "one on the chip and one off it"]),
    ({"memory__1__bandwidth_gb_per_s": q(101)}, ["dram", "bandwidth_gb_per_s = 101", "at most 100", "width_bits"]),
    ({"array__accumulator_bits": q(128)}, ["array.accumulator_bits", "128", "8 to 64 bits"]),
    ({"array__macs__2": ...}, ["array.macs", "[32, 32]"]),
    # numbers that contradict each other
    ({"array__macs__1__energy_pj_per_mac": q(0.5)}, ["energy_pj_per_mac = 0.5", "[16, 8]", "at least 1"]),
    ({"array__macs__1__macs_per_cycle": q(300)}, ["macs_per_cycle = 300", "[16, 8]", "at most 200"]),
    ({"array__macs__1__operand_bits": [8, 8]}, ["[8, 8] twice"]),
    ({"vector_unit__operations__1__add_pj_per_op": q(0.05)}, ["add_pj_per_op = 0.05", "at least 0.1"]),
    ({"vector_unit__operations__1__operand_bits": 8}, ["8 bits twice"]),
    ({"memory__1__size_bytes": q(1000)}, ["dram", "size_bytes = 1000", "more than 2000"]),
    ({"memory__1__energy_pj_per_bit": q(0.1)}, ["dram", "energy_pj_per_bit = 0.1", "at least 0.5"]),
    ({"memory__1__name": "sram"}, ["sram twice"]),
    ({"memory__1__name": "static"}, ["static"]),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "parts"), MALFORMED, ids=lambda value: str(value)[:60])
def test_a_malformed_board_error_names_key_value_and_range(changes: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(BoardError) as caught:
        parse_board(description(**changes), "mine.yaml")
    message = str(caught.value)
    assert message.startswith("mine.yaml")
    assert [part for part in parts if part not in message] == []
    assert "\n" not in message


@pytest.mark.parametrize("text", ["", "- 1", "a: [", "just words", "{1: 2}", "? [1]\n: 2", "a: 1\na: 2"])
def test_text_that_is_no_description_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(BoardError) as caught:
        parse_board(text, "mine.yaml")
    assert "\n" not in str(caught.value)


def test_a_repeated_key_is_refused() -> None:
    with pytest.raises(BoardError, match="clock_mhz"):
        parse_board(description() + "clock_mhz: 3\n")


def test_widths_that_are_not_listed_cost_what_the_next_wider_pair_does() -> None:
    board = bench()
    assert board.mac(8, 8) == board.mac(4, 5) == (200, 1)
    assert board.mac(8, 16) == board.mac(16, 8) == board.mac(3, 9) == (100, 2)
    assert board.mac(16, 16) == board.mac(8, 32) == (50, 10)
    assert board.mac(33, 8) is None
    assert board.vector(5) == (0.1, 0.5)
    assert board.vector(9) == board.vector(64) == (1, 4)


widths = st.integers(1, 32)


@given(widths, widths, widths, widths)
def test_a_mac_of_narrower_operands_is_never_dearer_or_slower(a: int, b: int, c: int, d: int) -> None:
    for board in (bench(), load_board("zedboard")):
        narrow, wide = board.mac(min(a, c), min(b, d)), board.mac(max(a, c), max(b, d))
        assert narrow is not None
        assert wide is not None
        assert narrow.energy_pj <= wide.energy_pj
        assert narrow.macs_per_cycle >= wide.macs_per_cycle
        assert board.mac(a, b) == board.mac(b, a)
