"""A stable text form of graphs: operation, operands, dtype and shape, annotations; no addresses, no paths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

_SHORT = {
    torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "b8",
}  # fmt: skip


def dump(graph: fx.Graph) -> str:
    """Return one line a node: ``%name: type = op target(operands) {annotations}``."""
    symbols: dict[str, str] = {}
    return "\n".join(_line(node, symbols) for node in graph.nodes)


def _line(node: fx.Node, symbols: dict[str, str]) -> str:
    if node.op == "output":
        return f"return {_value(node.args[0], symbols)}"
    kind = type_of(node.meta.get("val"), symbols)
    notes = "".join(f" {k[3:]}={_note(node.meta[k])}" for k in sorted(_ANNOTATIONS & node.meta.keys()) if node.meta[k])
    operands = [_value(a, symbols) for a in node.args]
    operands += [f"{k}={_value(v, symbols)}" for k, v in sorted(node.kwargs.items())]
    call = "" if node.op == "placeholder" else f" {target_name(node)}({', '.join(operands)})"
    return f"%{node.name}: {kind} = {node.op}{call}" + (f" {{{notes.strip()}}}" if notes else "")


_ANNOTATIONS = {"e2_bits", "e2_block", "e2_path", "e2_tag", "e2_technique"}


def _note(value: Any) -> str:
    return str(value)


def target_name(node: fx.Node) -> str:
    """Name of what a node calls, stable between processes and torch versions."""
    if isinstance(node.target, str):
        return node.target
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    return f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__name__', node.target)}".lstrip(".")


def dtype_name(dtype: torch.dtype) -> str:
    """Short name of an element type, e.g. ``f32``."""
    return _SHORT.get(dtype, str(dtype).removeprefix("torch."))


def type_of(value: Any, symbols: dict[str, str] | None = None) -> str:
    """Short type of a node's value, e.g. ``f32[B, 16, 32, 32]``; symbolic sizes are named B, B1, ... in order."""
    symbols = {} if symbols is None else symbols
    if isinstance(value, torch.Tensor):
        shape = ", ".join(_size(s, symbols) for s in value.shape)
        return f"{dtype_name(value.dtype)}[{shape}]"
    if isinstance(value, tuple | list):
        return f"({', '.join(type_of(v, symbols) for v in value)})"
    if isinstance(value, torch.SymInt):
        return f"int {_size(value, symbols)}"
    return "none" if value is None else type(value).__name__


def _size(size: Any, symbols: dict[str, str]) -> str:
    if isinstance(size, int):
        return str(size)
    expression = size.node.expr
    for symbol in sorted(expression.free_symbols, key=str):
        symbols.setdefault(str(symbol), "B" if not symbols else f"B{len(symbols)}")
    text = str(expression)
    for name in sorted(symbols, key=len, reverse=True):
        text = text.replace(name, symbols[name])
    return text


def _value(value: Any, symbols: dict[str, str]) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, list | tuple):
        inner = ", ".join(_value(v, symbols) for v in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_value(v, symbols)}" for k, v in value.items()) + "}"
    if isinstance(value, slice):
        return f"{_value(value.start, symbols)}:{_value(value.stop, symbols)}:{_value(value.step, symbols)}"
    if isinstance(value, torch.SymInt):
        return _size(value, symbols)
    return repr(value)


def short_op(op: str) -> str:
    """Name of an operator without namespace and overload: ``convolution`` for ``aten.convolution.default``."""
    parts = op.split(".")
    return parts[1] if len(parts) > 2 and parts[0] in ("aten", "e2pass", "prims") else parts[-1]
