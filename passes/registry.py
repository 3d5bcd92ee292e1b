"""Passes by name: a lazy table, and pipelines as text."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from e2pass.errors import ConfigError
from e2pass.passes.base import Pass

PASSES: dict[str, str] = {
    "find-residual-blocks": "e2pass.passes.find_residual_blocks:FindResidualBlocks",
    "insert-gates": "e2pass.passes.insert_gates:InsertGates",
    "outline": "e2pass.passes.outline:Outline",
    "lower": "e2pass.passes.lower:Lower",
    "weigh-gates": "e2pass.passes.price:WeighGates",
    "quantize": "e2pass.passes.quantize:Quantize",
    "predict-signs": "e2pass.passes.predict_signs:PredictSigns",
    "drop-batches": "e2pass.passes.drop_batches:DropBatches",
    "price": "e2pass.passes.price:Price",
}
"""``module:Class`` of every pass; a class is imported when it is asked for."""

_SPEC = re.compile(r"\s*([\w-]+)\s*(?:\{([^{}]*)\})?\s*")


def get(name: str) -> type[Pass]:
    """Return the class of a pass.

    Raises:
        ConfigError: For an unknown name.
    """
    if name not in PASSES:
        raise ConfigError(f"there is no pass {name!r}; the passes are {', '.join(PASSES)}")
    module, _, class_name = PASSES[name].partition(":")
    found: type[Pass] = getattr(import_module(module), class_name)
    return found


def parse(text: str, **given: Any) -> list[Pass]:
    """Read a pipeline such as ``find-residual-blocks,insert-gates{skip=0.4,gate=random}``.

    The inverse of ``Pass.spec`` for passes whose options are numbers, words, truth values and tuples of words.

    Args:
        text: The pipeline.
        given: Options that text cannot give, by name, for the passes that need them (``step`` for those that price).

    Raises:
        ConfigError: For text that is no pipeline, an unknown pass or option, or a value of the wrong kind.
    """
    return [_make(name, options, given) for name, options in _specs(text)]


def _specs(text: str) -> Iterator[tuple[str, str]]:
    position = 0
    while True:
        match = _SPEC.match(text, position)
        if match is None:
            raise ConfigError(f"{text[position:]!r} is no pass; write name or name{{option=value,...}}")
        yield match[1], match[2] or ""
        position = match.end()
        if position == len(text):
            return
        if text[position] != ",":
            raise ConfigError(f"unexpected {text[position:]!r} after pass {match[1]!r}; passes are separated by commas")
        position += 1


def _make(name: str, text: str, given: Mapping[str, Any]) -> Pass:
    kind = get(name)
    types = get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    options: dict[str, Any] = {key: value for key, value in given.items() if key in fields}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = item.partition("=")
        field = key.replace("-", "_")
        if not equals or field not in fields:
            valid = ", ".join(f.replace("_", "-") for f in fields) or "none"
            raise ConfigError(f"pass {name} has no option {item!r}; its options, each written key=value, are: {valid}")
        options[field] = _value(f"{name}{{{item}}}", types[field], value)
    missing = [f.name for f in fields.values() if f.name not in options and f.default is dataclasses.MISSING]
    if missing:
        raise ConfigError(f"pass {name} needs {missing[0]}, which text cannot give; create it in Python")
    return kind(**options)


def _boolean(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


_READERS: dict[Any, Callable[[str], Any]] = {float: float, int: int, str: str, bool: _boolean}


def _value(where: str, kind: Any, text: str) -> Any:
    if get_origin(kind) is UnionType:  # X | None
        if text == "None":
            return None
        kind = next(k for k in get_args(kind) if k is not NoneType)
    if get_origin(kind) is tuple:
        return tuple(filter(None, text.split("+")))
    if get_origin(kind) is Literal:
        if text in get_args(kind):
            return text
        raise ConfigError(f"{where}: {text!r} is not one of {', '.join(get_args(kind))}")
    if kind not in _READERS:
        raise ConfigError(f"{where}: this option cannot be given as text; create the pass in Python")
    try:
        return _READERS[kind](text)
    except (KeyError, ValueError):
        raise ConfigError(f"{where}: {text!r} is not of type {kind.__name__}") from None
