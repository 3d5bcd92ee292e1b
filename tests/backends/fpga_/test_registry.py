from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from e2pass.backends.fpga import FpgaCostModel, Work, declare_free, lookup, register_cost, registered, unregister
from e2pass.cost import Free, OpSite, Unsupported
from e2pass.errors import ConfigError
from tests.backends.fpga_.sites import T, priced, site

FREE = {op: entry for op, entry in registered() if isinstance(entry, Free)}
PRICED = {op for op, entry in registered() if not isinstance(entry, Free)}


@pytest.fixture
def own_op() -> Iterator[str]:
    yield "mylib.scale"
    if lookup("mylib.scale") is not None:
        unregister("mylib.scale")


def work(site: OpSite) -> Work:
    return Work("in + out", read_bytes=100.0, write_bytes=100.0)


def test_an_own_operator_can_be_priced(own_op: str) -> None:
    model, mine = FpgaCostModel(), site("mylib.scale.default", (T(4),), T(4))
    assert isinstance(model.cost(mine), Unsupported)
    register_cost(own_op)(work)
    assert priced(model.cost(mine)).traffic_bytes["ddr3"] == 200


def test_priced_and_free_exclude_each_other(own_op: str) -> None:
    register_cost(own_op)(work)
    with pytest.raises(ConfigError, match=r"mylib\.scale.*priced"):
        register_cost(own_op)(work)
    with pytest.raises(ConfigError, match="priced"):
        declare_free("a view", own_op)
    unregister(own_op)
    declare_free("a view", own_op)
    with pytest.raises(ConfigError, match="free"):
        register_cost(own_op)(work)
    with pytest.raises(ConfigError, match="free"):
        declare_free("a view", own_op)


def test_unregistering_what_is_not_there_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"no\.such"):
        unregister("no.such")


def test_an_overload_of_its_own_wins_over_the_operator(own_op: str) -> None:
    register_cost(own_op)(work)
    declare_free("a view", "mylib.scale.view")
    assert isinstance(lookup("mylib.scale.view"), Free)
    assert lookup("mylib.scale.default") is work
    assert lookup("mylib.scale_.default") is work  # in place
    unregister("mylib.scale.view")


def test_every_registered_aten_name_exists() -> None:
    unknown: list[str] = []
    for op in {*FREE, *PRICED}:
        if op.startswith("aten."):
            place: Any = torch.ops.aten
            for part in op.split(".")[1:]:
                place = getattr(place, part, None)
            if place is None:
                unknown.append(op)
    assert unknown == []


def overloads(op: str) -> list[torch._ops.OpOverload]:
    packet = getattr(torch.ops.aten, op.split(".")[1])
    return [getattr(packet, name) for name in packet.overloads() if not name.endswith("out")]


def test_every_aten_operator_declared_free_as_a_view_aliases_its_input() -> None:
    # These promise nothing about aliasing in their schema, but return views all the same.
    unsafe = {
        "aten._unsafe_view",
        "aten.unsafe_chunk",
        "aten.unsafe_split",
        "aten.unsafe_split_with_sizes",
        "aten.lift",
    }
    views = {op for op, entry in FREE.items() if entry.reason.startswith("a view")} - unsafe
    assert len(views) > 20
    for op in views:
        returns = [r for overload in overloads(op) for r in overload._schema.returns]
        assert any(r.alias_info is not None for r in returns), f"{op} is declared a view but returns new memory"


def test_no_declared_free_operator_computes() -> None:
    """Those that are no views return no tensor, or one that nobody has written to."""
    for op, entry in FREE.items():
        if op.startswith("aten.") and not entry.reason.startswith("a view"):
            kinds = {str(r.type) for overload in overloads(op) for r in overload._schema.returns}
            assert "empty" in op or "Tensor" not in kinds, f"{op} returns {kinds}"


def test_every_reason_says_something() -> None:
    assert all(len(entry.reason.split()) >= 3 for entry in FREE.values())


def test_a_formula_that_does_not_fit_the_arguments_is_reported_not_raised() -> None:
    cost = FpgaCostModel().cost(site("aten.mm.default", (T(3, 4), T(5, 6)), T(3, 6)))
    assert isinstance(cost, Unsupported)
    assert "aten.mm.default" in cost.reason
    assert "inner dimensions" in cost.reason
    assert isinstance(FpgaCostModel().cost(site("aten.mm.default", ())), Unsupported)


def test_widths_without_a_mac_are_unsupported() -> None:
    double = T(4, 4, bits=64)
    cost = FpgaCostModel().cost(site("aten.mm.default", (double, double), double))
    assert isinstance(cost, Unsupported)
    assert "64" in cost.reason


def test_python_arithmetic_is_free_on_sizes_only() -> None:
    model = FpgaCostModel()
    assert isinstance(model.cost(site("<built-in function mul>", (3, 4))), Free)
    assert isinstance(model.cost(site("<built-in function add>", (T(3), T(3)), T(3))), Unsupported)
