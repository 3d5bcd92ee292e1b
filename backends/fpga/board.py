"""Board descriptions: a checked schema, read from YAML that ships with the package or that a user wrote.

Every number is a :class:`Quantity`: its value, what kind of evidence it is, and its source. Its unit is in its key.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from e2pass.errors import BoardError

FLOAT_BITS = 32
"""Operands of this width are fp32; narrower ones are integer codes."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Quantity(_Model):
    """A number, what kind of evidence it is, and where it comes from."""

    value: float
    evidence: Literal["data sheet", "literature", "estimate"]
    source: str = Field(min_length=10)


@dataclass(frozen=True)
class _Range:
    """Admits quantities from ``low`` to ``high``, both included."""

    low: float
    high: float
    unit: str

    def __call__(self, quantity: Quantity) -> Quantity:
        if not self.low <= quantity.value <= self.high:
            raise PydanticCustomError("range", "{text}", {"value": quantity.value, "text": str(self)})
        return quantity

    def __str__(self) -> str:
        return f"the allowed range is {self.low:g} to {self.high:g} {self.unit}".rstrip()


def _within(low: float, high: float, unit: str) -> AfterValidator:
    return AfterValidator(_Range(low, high, unit))


class MacCost(NamedTuple):
    """What a multiply-accumulate of two given operand widths takes."""

    macs_per_cycle: float
    energy_pj: float


class VectorCost(NamedTuple):
    """What an element-wise operation of a given width takes."""

    add_pj: float
    multiply_pj: float


Width = Annotated[int, Field(ge=1, le=64)]
Count = Annotated[Quantity, _within(1, 1e8, "")]
MacEnergy = Annotated[Quantity, _within(0.001, 1000, "pJ per MAC")]
OpEnergy = Annotated[Quantity, _within(0.001, 1000, "pJ per operation")]
Power = Annotated[Quantity, _within(0, 500, "W")]


class Resources(_Model):
    """What the fabric of the FPGA holds."""

    dsp_slices: Count
    luts: Count
    flip_flops: Count
    bram36_blocks: Count


class MacRate(_Model):
    """Throughput and energy of multiply-accumulates with operands of two widths (in either order)."""

    operand_bits: Annotated[list[Width], Field(min_length=2, max_length=2)]
    macs_per_cycle: Annotated[Quantity, _within(0.01, 1e6, "MACs per cycle")]
    energy_pj_per_mac: MacEnergy

    def covers(self, bits: tuple[int, int]) -> bool:
        """Whether both operands are at least as wide as ``bits``, in one order or the other."""
        return all(have >= want for have, want in zip(sorted(self.operand_bits), sorted(bits), strict=True))


class Array(_Model):
    """The processing array: ``rows_pe`` times ``columns_pe`` processing elements, output stationary.

    Partial sums leave it at ``accumulator_bits``.
    """

    rows_pe: Annotated[Quantity, _within(1, 4096, "processing elements")]
    columns_pe: Annotated[Quantity, _within(1, 4096, "processing elements")]
    accumulator_bits: Annotated[Quantity, _within(8, 64, "bits")]
    macs: Annotated[list[MacRate], Field(min_length=1)]


class VectorRate(_Model):
    """Energy of one element-wise operation on operands of a width."""

    operand_bits: Width
    add_pj_per_op: OpEnergy
    multiply_pj_per_op: OpEnergy


class VectorUnit(_Model):
    """What computes element-wise work."""

    ops_per_cycle: Annotated[Quantity, _within(0.01, 1e6, "operations per cycle")]
    operations: Annotated[list[VectorRate], Field(min_length=1)]


class MemoryLevel(_Model):
    """One level of the memory hierarchy; reads and writes cost the same.

    ``bandwidth_gb_per_s`` is what it sustains: at most ``width_bits`` in each of its transfers.
    """

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    size_bytes: Annotated[Quantity, _within(1, 1e13, "bytes")]
    width_bits: Annotated[Quantity, _within(1, 1e6, "bits")]
    transfers_mt_per_s: Annotated[Quantity, _within(0.01, 1e5, "million transfers per second")]
    bandwidth_gb_per_s: Annotated[Quantity, _within(0.001, 1e5, "GB/s")]
    energy_pj_per_bit: Annotated[Quantity, _within(0.0001, 500, "pJ per bit")]


class BoardPower(_Model):
    """Power that is drawn for as long as the step lasts, whatever is computed."""

    static_w: Power
    processing_system_w: Power


class Board(_Model):
    """A board: clock, resources, processing array, vector unit, memories (from the inside out) and fixed power."""

    schema_: Literal["e2pass/board/1"] = Field(alias="schema")
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    title: str
    clock_mhz: Annotated[Quantity, _within(1, 5000, "MHz")]
    resources: Resources | None = None
    array: Array
    vector_unit: VectorUnit
    memory: Annotated[list[MemoryLevel], Field(min_length=2)]
    power: BoardPower

    @property
    def on_chip(self) -> MemoryLevel:
        """The outermost level on the chip, where tiles are kept."""
        return self.memory[-2]

    @property
    def off_chip(self) -> MemoryLevel:
        """The off-chip memory."""
        return self.memory[-1]

    def mac(self, a_bits: int, b_bits: int) -> MacCost | None:
        """Return throughput and energy of a MAC whose operands have these widths; None if none is wide enough.

        The rule for pairs that are not listed: as cheap as the cheapest, and as fast as the fastest, of the listed
        pairs that are at least as wide in both operands. So neither ever falls when an operand gets narrower.
        """
        covering = [rate for rate in self.array.macs if rate.covers((a_bits, b_bits))]
        if not covering:
            return None
        return MacCost(
            max(rate.macs_per_cycle.value for rate in covering), min(rate.energy_pj_per_mac.value for rate in covering)
        )

    def vector(self, bits: int) -> VectorCost:
        """Return the energies of the narrowest listed width that is at least ``bits``, or of the widest there is."""
        ordered = sorted(self.vector_unit.operations, key=lambda rate: rate.operand_bits)
        rate = next((rate for rate in ordered if rate.operand_bits >= bits), ordered[-1])
        return VectorCost(rate.add_pj_per_op.value, rate.multiply_pj_per_op.value)

    def quantities(self) -> Iterator[tuple[str, Quantity]]:
        """Iterate over every number of the description as ``(key, quantity)``."""
        yield from _quantities("", self)

    @model_validator(mode="after")
    def _consistent(self) -> Board:
        _check_mac_table(self.array.macs)
        _check_vector_table(self.vector_unit.operations)
        _check_hierarchy(self.memory)
        return self


def list_boards() -> tuple[str, ...]:
    """Return the names of the boards that ship with e2pass."""
    folder = resources.files("e2pass.backends.fpga.boards")
    return tuple(sorted(Path(f.name).stem for f in folder.iterdir() if f.name.endswith(".yaml")))


def load_board(board: str | os.PathLike[str]) -> Board:
    """Read a board description.

    Args:
        board: Name of a board that ships with e2pass (see :func:`list_boards`), or path of a YAML file.

    Raises:
        BoardError: If there is no such board or file, or the description is malformed; the message names key, value
            and allowed range.
    """
    if isinstance(board, str) and board in list_boards():
        text = resources.files("e2pass.backends.fpga.boards").joinpath(f"{board}.yaml").read_text(encoding="utf-8")
        return parse_board(text, board)
    path = Path(board)
    if path.suffix not in {".yaml", ".yml"} or not path.is_file():
        raise BoardError(f"no board {str(board)!r}: give one of {', '.join(list_boards())} or the path of a .yaml file")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BoardError(f"board file {path} cannot be read: {error}") from None
    return parse_board(text, str(path))


def parse_board(text: str, origin: str = "board") -> Board:
    """Parse and check the YAML ``text`` of a description; ``origin`` names it in errors.

    Raises:
        BoardError: If the description is malformed.
    """
    try:
        data = yaml.load(text, Loader=_UniqueKeys)
    except yaml.YAMLError as error:
        raise BoardError(f"{origin} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise BoardError(f"{origin} holds no board description but {type(data).__name__}; see boards/zedboard.yaml")
    try:
        return Board.model_validate(data)
    except ValidationError as error:
        raise BoardError(f"{origin}: {_explain(error.errors()[0])}") from None


class _UniqueKeys(yaml.SafeLoader):
    """YAML without repeated keys: by default the last one would win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[object] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _explain(error: ErrorDetails) -> str:
    """Turn a pydantic error into one sentence that names key, value and what is allowed."""
    key, found = ".".join(map(str, error["loc"])), error["input"]
    match error["type"]:
        case "extra_forbidden":
            return f"unknown key {key} = {found!r}; the keys allowed there are {', '.join(_keys_at(error['loc'][:-1]))}"
        case "missing":
            return f"key {key} is missing; {_hint(error['loc'])}"
        case "too_short" if key == "memory":
            return f"memory lists {error['ctx']['actual_length']} levels; a board needs one on the chip and one off it"
        case "range":
            return f"{key} = {error['ctx']['value']:g} is not allowed: {error['msg']}"
        case "inconsistent":
            return error["msg"]
        case _:
            message = error["msg"][0].lower() + error["msg"][1:]
            return f"{key} = {found!r} is not allowed: {message}; {_hint(error['loc'])}"


def _walk(location: tuple[int | str, ...]) -> tuple[type[BaseModel], _Range | None]:
    """Follow ``location`` through the schema to the innermost model on the way, and the range stated for it."""
    model: type[BaseModel] = Board
    allowed: _Range | None = None
    for part in location:
        field = next((f for name, f in model.model_fields.items() if part in (name, f.alias)), None)
        if field is None:
            continue
        checks = (getattr(entry, "func", None) for entry in field.metadata)
        allowed = next((check for check in checks if isinstance(check, _Range)), allowed)
        inner = (get_args(field.annotation) or (field.annotation,))[0]
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            model = inner
    return model, allowed


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    model, _ = _walk(location)
    return [field.alias or name for name, field in model.model_fields.items()]


def _hint(location: tuple[int | str, ...]) -> str:
    """Say what belongs there, and the range that the schema states for it."""
    model, allowed = _walk(location)
    if model is not Quantity:
        return "boards/zedboard.yaml is a complete description"
    form = "write {value: NUMBER, evidence: data sheet | literature | estimate, source: WHERE IT IS FROM}"
    return f"{form}; {allowed}" if allowed else form


def _inconsistent(message: str) -> PydanticCustomError:
    # The template language of pydantic would read braces in the message.
    return PydanticCustomError("inconsistent", "{text}", {"text": message})


def _check_mac_table(rates: list[MacRate]) -> None:
    """Wider operands must not be cheaper or faster, and the table must reach fp32: it is the fallback of all others."""
    if not any(rate.covers((FLOAT_BITS, FLOAT_BITS)) for rate in rates):
        raise _inconsistent(f"array.macs lists no pair [{FLOAT_BITS}, {FLOAT_BITS}], which every board needs")
    pairs = [tuple(sorted(rate.operand_bits)) for rate in rates]
    for pair in pairs:
        if pairs.count(pair) > 1:
            raise _inconsistent(f"array.macs lists the pair {list(pair)} twice")
    for wide in rates:
        for narrow in rates:
            if not wide.covers((narrow.operand_bits[0], narrow.operand_bits[1])):
                continue
            if wide.energy_pj_per_mac.value < narrow.energy_pj_per_mac.value:
                key, allowed = "energy_pj_per_mac", f"at least {narrow.energy_pj_per_mac.value:g}"
                value = wide.energy_pj_per_mac.value
            elif wide.macs_per_cycle.value > narrow.macs_per_cycle.value:
                key, allowed = "macs_per_cycle", f"at most {narrow.macs_per_cycle.value:g}"
                value = wide.macs_per_cycle.value
            else:
                continue
            raise _inconsistent(
                f"array.macs {wide.operand_bits}: {key} = {value:g} is not allowed: {allowed}, the value of the "
                f"narrower pair {narrow.operand_bits}"
            )


def _check_vector_table(rates: list[VectorRate]) -> None:
    ordered = sorted(rates, key=lambda rate: rate.operand_bits)
    for narrow, wide in pairwise(ordered):
        if narrow.operand_bits == wide.operand_bits:
            raise _inconsistent(f"vector_unit.operations lists {wide.operand_bits} bits twice")
        for key in ("add_pj_per_op", "multiply_pj_per_op"):
            low, value = getattr(narrow, key).value, getattr(wide, key).value
            if value < low:
                raise _inconsistent(
                    f"vector_unit.operations {wide.operand_bits} bits: {key} = {value:g} is not allowed: at least "
                    f"{low:g}, the value of {narrow.operand_bits} bits"
                )


def _check_hierarchy(levels: list[MemoryLevel]) -> None:
    """Names must be unique, and outer levels larger and no cheaper per bit than inner ones."""
    names = [level.name for level in levels]
    for name in names:
        if names.count(name) > 1:
            raise _inconsistent(f"memory lists the level {name} twice")
        if name in {"compute", "static"}:
            raise _inconsistent(f"memory level {name!r} is not allowed: reports use that name for something else")
    for level in levels:
        peak = level.width_bits.value / 8 * level.transfers_mt_per_s.value / 1e3
        if level.bandwidth_gb_per_s.value > peak * (1 + 1e-9):
            raise _inconsistent(
                f"memory {level.name}: bandwidth_gb_per_s = {level.bandwidth_gb_per_s.value:g} is not allowed: at most "
                f"{peak:g}, its width_bits times its transfers_mt_per_s"
            )
    for inner, outer in pairwise(levels):
        if outer.size_bytes.value <= inner.size_bytes.value:
            raise _inconsistent(
                f"memory {outer.name}: size_bytes = {outer.size_bytes.value:g} is not allowed: more than "
                f"{inner.size_bytes.value:g}, the size of {inner.name} (levels stand from the inside out)"
            )
        if outer.energy_pj_per_bit.value < inner.energy_pj_per_bit.value:
            raise _inconsistent(
                f"memory {outer.name}: energy_pj_per_bit = {outer.energy_pj_per_bit.value:g} is not allowed: at least "
                f"{inner.energy_pj_per_bit.value:g}, the value of {inner.name}"
            )


def _quantities(prefix: str, value: object) -> Iterator[tuple[str, Quantity]]:
    if isinstance(value, Quantity):
        yield prefix, value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _quantities(f"{prefix}.{name}" if prefix else name, getattr(value, name))
    elif isinstance(value, list):
        for item in value:
            label = getattr(item, "name", None) or getattr(item, "operand_bits", None)
            text = "x".join(map(str, label)) if isinstance(label, list) else str(label)
            yield from _quantities(f"{prefix}[{text}]", item)
