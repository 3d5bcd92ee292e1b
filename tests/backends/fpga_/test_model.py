"""Cycles, bytes and joules: worked out by hand on a board of round numbers, and as properties."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from e2pass.backends.fpga import FpgaCostModel, parse_board
from e2pass.backends.fpga.tilings import Objective
from e2pass.cost import Free, OpSite
from tests.backends.fpga_.bench import bench, description, q
from tests.backends.fpga_.sites import T, conv, conv_backward, mm, priced, site

BENCH = FpgaCostModel(bench())  # 10 x 5 array at 100 MHz, 50 fp32 MACs and 10 bytes of DRAM per cycle, 2000 B on chip
ZED = FpgaCostModel("zedboard")


def test_one_convolution_by_hand() -> None:
    """1x2x4x4 input (128 B), 3x2x3x3 weight (216 B), 1x3x4x4 result (192 B); all fit into 1000 B."""
    cost = priced(BENCH.cost(conv(1, 2, 3, 4)))
    macs = 16 * 3 * 2 * 9
    dram = 128 + 216 + 192
    # Buffered once; the input is shared by the 3 columns in use, the weight by 8 rows in 2 rounds; the result once.
    sram = dram + macs * 4 / 3 + macs * 4 / 8 + 192
    # 53.6; the array takes 864 / 50 / 0.48 = 36: 16 positions use 4/5 of two rounds of 10 rows, 3 channels 3/5
    cycles = dram / 10
    assert cost.macs == macs == 864
    assert cost.traffic_bytes == {"dram": dram, "sram": pytest.approx(sram)}
    assert cost.cycles == pytest.approx(cycles)
    assert cost.time_s == pytest.approx(53.6e-8)
    assert cost.energy_j == {
        "compute": pytest.approx(864 * 10e-12),
        "sram": pytest.approx(sram * 8 * 0.5e-12),
        "dram": pytest.approx(536 * 8 * 20e-12),
        "static": pytest.approx(2.0 * 53.6e-8),
    }


def test_the_same_convolution_on_codes_by_hand() -> None:
    """8-bit input, 16-bit weight: a quarter and half of the bytes, the rate of the pair 16x8."""
    cost = priced(BENCH.cost(conv(1, 2, 3, 4, bits=(8, 16))))
    assert cost.traffic_bytes["dram"] == 128 / 4 + 216 / 2 + 192
    assert cost.energy_j["compute"] == pytest.approx(864 * 2e-12)


def test_the_slowest_unit_decides() -> None:
    """With a hundred times the DRAM bandwidth the array takes longest."""
    fast = FpgaCostModel(bench(memory__1__bandwidth_gb_per_s=q(100)))
    assert priced(fast.cost(conv(1, 2, 3, 4))).cycles == pytest.approx(864 / 50 / (16 / 20 * 3 / 5))


def test_elementwise_by_hand() -> None:
    cost = priced(BENCH.cost(site("aten.add.Tensor", (T(10, 10), T(10, 10)), T(10, 10))))
    assert cost.traffic_bytes == {"dram": 1200, "sram": 2400}
    assert (cost.macs, cost.alu_ops) == (0, 100)
    assert cost.energy_j["compute"] == pytest.approx(100 * 1e-12)
    assert cost.cycles == pytest.approx(120)


STREAMS: list[tuple[str, OpSite, float]] = [
    ("relu reads and writes", site("aten.relu.default", (T(100),), T(100)), 800),
    ("a broadcast operand is read at its own size", site("aten.mul.Tensor", (T(10, 10), T(10, 1)), T(10, 10)), 840),
    ("clone moves", site("aten.clone.default", (T(100),), T(100)), 800),
    ("copy does not read its destination", site("aten.copy.default", (T(100), T(100)), T(100)), 800),
    ("cat reads all parts", site("aten.cat.default", ((T(10), T(20)), 0), T(30)), 240),
    ("a fill is written", site("aten.zeros.default", ((100,),), T(100)), 400),
    ("new_zeros does not read", site("aten.new_zeros.default", (T(500), (100,)), T(100)), 400),
    ("softmax, rows that fit", site("aten._softmax.default", (T(4, 250), -1, False), T(4, 250)), 8000),
    ("softmax, a row of 1004 B", site("aten._softmax.default", (T(4, 251), -1, False), T(4, 251)), 4 * 251 * 4 * 3),
    ("embedding reads the named rows", site("aten.embedding.default", (T(999, 5), T(3, bits=64)), T(3, 5)), 144),
    ("index reads what it picks", site("aten.index.Tensor", (T(999), (T(10, bits=64),)), T(10)), 160),
    ("pool backward skips the forward input",
     site("aten.max_pool2d_with_indices_backward.default",
          (T(1, 1, 2, 2), T(1, 1, 4, 4), (2, 2), (2, 2), (0, 0), (1, 1), False, T(1, 1, 2, 2, bits=64)), T(1, 1, 4, 4)),
     16 + 32 + 64),
    ("nll picks one per target",
     site("aten.nll_loss_forward.default", (T(9, 5), T(9, bits=64), None, 1, -100), T(), T()), 9 * 4 + 9 * 8 + 8),
    ("codes are narrow", site("e2pass.msb.default", (T(100, bits=8), T(), 8, 4), T(100, bits=4), T()), 100 + 50 + 8),
    ("quantize reads once what fits", site("e2pass.quantize.default", (T(250), 8), T(250, bits=8), T()), 1000 + 254),
    ("and twice what does not", site("e2pass.quantize.default", (T(251), 8), T(251, bits=8), T()), 2008 + 255),
    ("but not with a known scale", site("e2pass.quantize_running.default", (T(251), 8, T()), T(251, bits=8), T()),
     1004 + 255),
    ("select", site("e2pass.select.default", (T(50), T(50), T()), T(50)), 604),
    ("sgd with momentum", site("optimizer.sgd_momentum", (T(100), T(100), T(100)), T(100), T(100)), 5 * 400),
    ("adam", site("optimizer.adam", (T(100), T(100), T(100), T(100))), 7 * 400),
    ("one-bit signs", site("optimizer.sgd", (T(80), T(80, bits=1))), 320 * 2 + 10),
]  # fmt: skip


@pytest.mark.parametrize(("op", "expected"), [case[1:] for case in STREAMS], ids=[case[0] for case in STREAMS])
def test_off_chip_bytes(op: OpSite, expected: float) -> None:
    assert priced(BENCH.cost(op)).traffic_bytes["dram"] == expected


def batch_norm(n: int, *, training: bool) -> OpSite:
    x = T(n, 5, 5, 5)
    args = (x, T(5), T(5), T(5), T(5), training, 0.1, 1e-5)
    return site("aten._native_batch_norm_legit_functional.default", args, x, T(5), T(5), T(5), T(5))


def test_batch_norm_reads_twice_what_does_not_fit() -> None:
    """One channel takes 100 bytes a sample; 1000 fit."""
    vectors = 8 * 5 * 4  # four read, four written
    assert priced(BENCH.cost(batch_norm(10, training=True))).traffic_bytes["dram"] == 2 * 5000 + vectors
    assert priced(BENCH.cost(batch_norm(11, training=True))).traffic_bytes["dram"] == 3 * 5500 + vectors
    assert priced(BENCH.cost(batch_norm(11, training=False))).traffic_bytes["dram"] == 2 * 5500 + vectors


def test_batch_norm_backward_without_input_gradient_needs_one_pass() -> None:
    x = T(40, 5, 5, 5)
    args = (x, x, T(5), T(5), T(5), T(5), T(5), True, 1e-5)
    whole = site("aten.native_batch_norm_backward.default", (*args, (True, True, True)), x, T(5), T(5))
    sums = site("aten.native_batch_norm_backward.default", (*args, (False, True, True)), T(5), T(5))
    assert priced(BENCH.cost(whole)).traffic_bytes["dram"] == 5 * 20000 + 7 * 20
    assert priced(BENCH.cost(sums)).traffic_bytes["dram"] == 2 * 20000 + 7 * 20


def test_views_are_free_and_dequantize_says_why() -> None:
    assert isinstance(BENCH.cost(site("aten.view.default", (T(4, 4), (16,)), T(16))), Free)
    cost = BENCH.cost(site("e2pass.dequantize.default", (T(4, bits=8), T()), T(4)))
    assert isinstance(cost, Free)
    assert "emulation" in cost.reason


bits = st.integers(1, 32)


@given(st.tuples(bits, bits), st.tuples(bits, bits), st.sampled_from(["conv", "dw", "mm"]))
def test_narrower_operands_never_cost_more(one: tuple[int, int], other: tuple[int, int], kind: str) -> None:
    narrow, wide = (tuple(f(x, y) for x, y in zip(one, other, strict=True)) for f in (min, max))

    def price(objective: Objective, a: int, b: int) -> list[float]:
        if kind == "mm":
            op = mm(300, 200, 100, a, b)
        else:
            op = conv(8, 16, 32, 8, bits=(a, b))
            op = conv_backward(op, (False, True, False), gy_bits=b) if kind == "dw" else op
        costs = [priced(FpgaCostModel(board, objective=objective).cost(op)) for board in (BENCH.board, ZED.board)]
        return [sum(c.energy_j.values()) if objective == "energy" else c.time_s for c in costs]

    for objective in get_args(Objective):
        for less, more in zip(price(objective, *narrow), price(objective, *wide), strict=True):
            assert less <= more * (1 + 1e-12)


@given(st.integers(1, 64), st.integers(1, 64), st.sampled_from([ZED, BENCH]))
def test_convolution_is_affine_in_the_batch_beyond_one_tile(n: int, m: int, model: FpgaCostModel) -> None:
    """Where the weight fits on the chip: so much per sample, and the weight once; a whole array per sample."""
    one, more, none = (priced(model.cost(conv(b, 2, 10, 60, k=1))) for b in (n, n + m, m))
    weight = 2 * 10 * 4
    assert more.macs == one.macs + none.macs
    together = one.traffic_bytes[model.dram] + none.traffic_bytes[model.dram]
    assert more.traffic_bytes[model.dram] == together - weight
    inner = model.board.on_chip.name
    assert more.traffic_bytes[inner] == pytest.approx(one.traffic_bytes[inner] + none.traffic_bytes[inner] - weight)


@given(st.integers(1, 64), st.integers(1, 64))
def test_elementwise_is_linear_in_the_batch(n: int, m: int) -> None:
    one, more, none = (
        priced(ZED.cost(site("aten.gelu.default", (T(b, 100),), T(b, 100)))) for b in (n, n + m, m)
    )  # fmt: skip
    assert more.traffic_bytes["ddr3"] == one.traffic_bytes["ddr3"] + none.traffic_bytes["ddr3"]
    assert sum(more.energy_j.values()) == pytest.approx(sum(one.energy_j.values()) + sum(none.energy_j.values()))


def test_constant_divisors_and_squares_are_products() -> None:
    def ops(op: OpSite) -> float:
        return priced(BENCH.cost(op)).alu_ops

    x = T(100)
    assert ops(site("aten.div.Tensor", (x, 2.0), x)) == ops(site("aten.mul.Tensor", (x, x), x)) == 100
    assert ops(site("aten.pow.Tensor_Scalar", (x, 2), x)) == 100
    assert ops(site("aten.div.Tensor", (x, x), x)) > 100


def test_sources_state_every_number_with_its_evidence() -> None:
    sources = ZED.sources()
    assert sources["power.processing_system_w"].startswith("1.5 (estimate): ")
    assert len(sources) == sum(1 for _ in ZED.board.quantities())


def test_names_come_from_the_board() -> None:
    assert (BENCH.name, BENCH.dram) == ("bench", "dram")
    assert (ZED.name, ZED.dram) == ("zedboard", "ddr3")
    assert FpgaCostModel(parse_board(description())).board == BENCH.board
