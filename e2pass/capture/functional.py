"""In-place operations become out-of-place ones, so that every value in a graph is written once.

``torch.fx`` does not see aliasing: after ``relu_(x)`` a later use of ``x`` reads the new value although the graph says
the old one. Later uses are therefore rewired to the result. What cannot be rewritten with the same meaning (writes
through a view that is read elsewhere, into an input of the model, or into a buffer) is left alone.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils import _pytree as pytree

from e2pass.capture.shapes import ShapeWorld
from e2pass.diagnostics import Diagnostics

IN_PLACE_OPERATORS: dict[Callable[..., Any], Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
    operator.ipow: operator.pow,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.ixor: operator.xor,
}

_MODULES: dict[type[nn.Module], tuple[Callable[..., Any], tuple[str, ...]]] = {
    nn.ReLU: (F.relu, ()),
    nn.ReLU6: (F.relu6, ()),
    nn.LeakyReLU: (F.leaky_relu, ("negative_slope",)),
    nn.ELU: (F.elu, ("alpha",)),
    nn.SELU: (F.selu, ()),
    nn.CELU: (F.celu, ("alpha",)),
    nn.Hardtanh: (F.hardtanh, ("min_val", "max_val")),
    nn.SiLU: (F.silu, ()),
    nn.Mish: (F.mish, ()),
    nn.Hardswish: (F.hardswish, ()),
    nn.Hardsigmoid: (F.hardsigmoid, ()),
    nn.RReLU: (F.rrelu, ("lower", "upper")),
    nn.Threshold: (F.threshold, ("threshold", "value")),
    nn.Dropout: (F.dropout, ("p",)),
    nn.Dropout1d: (F.dropout1d, ("p",)),
    nn.Dropout2d: (F.dropout2d, ("p",)),
    nn.Dropout3d: (F.dropout3d, ("p",)),
}
_NEVER_IN_PLACE = (nn.AlphaDropout, nn.FeatureAlphaDropout)  # they ignore their own flag
_BY_MODE = {F.rrelu, F.dropout, F.dropout1d, F.dropout2d, F.dropout3d}

# These change sizes, strides or autograd state instead of values, or have no counterpart of the same meaning.
_NOT_VALUES = frozenset(
    {"as_strided_", "copy_", "rename_", "resize_", "resize_as_", "set_", "share_memory_", "squeeze_", "swapaxes_"}
    | {"swapdims_", "t_", "transpose_", "unsqueeze_"}
)


@dataclass(frozen=True)
class _Rewrite:
    """The out-of-place form of a node."""

    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class _InPlace:
    """A node that writes into the value of ``written``; ``pure`` is its out-of-place form, if it has one."""

    written: fx.Node
    pure: _Rewrite | None


def differs_by_mode(graph: fx.Graph, model: nn.Module) -> bool:
    """Whether some in-place module of ``graph`` needs its mode written into its functional form."""
    for node in graph.find_nodes(op="call_module", sort=False):
        module = model.get_submodule(node.target)
        known = _MODULES.get(type(module))
        if known and known[0] in _BY_MODE and getattr(module, "inplace", False):
            return True
    return False


def functionalize(
    graph: fx.Graph, model: nn.Module, training: bool, world: ShapeWorld, diagnostics: Diagnostics
) -> None:
    """Rewrite the in-place operations of an annotated graph.

    Args:
        graph: Graph with ``meta["val"]`` on every node; changed.
        model: Owner of its modules; not changed.
        training: The mode that the graph stands for.
        world: Where its fake values live.
        diagnostics: Receives what was left in place, and why.
    """
    aliases = _Aliases(graph)
    for node in list(graph.nodes):
        found = _in_place(node, model, training)
        if found is None:
            continue
        if found.written.op == "get_attr":  # updates of buffers are meant to last
            continue
        after, problem = aliases.reads_after(node, found.written)
        if found.pure is None and after:
            problem = problem or "it has no out-of-place form"
        if problem:
            diagnostics.warn("E2P120", node.name, f"the in-place operation {_title(node)} stays in place: {problem}")
        elif found.pure is not None:
            _apply(node, found.pure, found.written, after, world)


def _apply(
    node: fx.Node, pure: _Rewrite, written: fx.Node, after: list[tuple[fx.Node, fx.Node]], world: ShapeWorld
) -> None:
    node.op, node.target = pure.op, pure.target
    node.args, node.kwargs = pure.args, pure.kwargs
    result = node
    old: torch.Tensor = written.meta["val"]
    new = _evaluate(pure, world)
    if new is not None and new.dtype != old.dtype:  # in place keeps the dtype, out of place promotes
        with node.graph.inserting_after(node):
            result = node.graph.call_method("to", (node, old.dtype))
        result.meta = {**node.meta, "val": old}
        node.meta["val"] = new
        node.replace_all_uses_with(result, delete_user_cb=lambda user: user is not result)
    for user, alias in after:
        user.replace_input_with(alias, result)


def _evaluate(pure: _Rewrite, world: ShapeWorld) -> torch.Tensor | None:
    args, kwargs = fx.map_arg((pure.args, pure.kwargs), lambda n: n.meta["val"])
    with world.mode, torch.no_grad():
        if pure.op == "call_method":
            value = getattr(args[0], pure.target)(*args[1:], **kwargs)
        else:
            value = pure.target(*args, **kwargs)
    return value if isinstance(value, torch.Tensor) else None


class _Aliases:
    """Which values share memory, by the storages of their fake tensors."""

    def __init__(self, graph: fx.Graph) -> None:
        self._order = {node: i for i, node in enumerate(graph.nodes)}
        self._by_storage: dict[int, list[fx.Node]] = {}
        for node in graph.nodes:
            for storage in {_storage(value) for value in _tensors(node)}:
                self._by_storage.setdefault(storage, []).append(node)

    def reads_after(self, node: fx.Node, written: fx.Node) -> tuple[list[tuple[fx.Node, fx.Node]], str]:
        """Find who reads the memory of ``written`` after ``node`` wrote it.

        Returns:
            Pairs of a reader and the node by which it reads the value, and in words what forbids to rewire them.
        """
        value = written.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return [], "what it writes is no tensor"
        readers: list[tuple[fx.Node, fx.Node]] = []
        for alias in self._by_storage.get(_storage(value), [written]):
            if self._order[alias] >= self._order[node]:
                continue
            if alias.op == "placeholder":
                return readers, f"it writes into the input {alias.name!r}, which the caller sees"
            if alias.op == "get_attr":
                return readers, f"it writes into {alias.target}"
            later = [user for user in alias.users if self._order.get(user, -1) > self._order[node]]
            if later and not _same_geometry(alias.meta.get("val"), value):
                return readers, f"{alias.name!r} shares its memory in another shape and is read later"
            readers += [(user, alias) for user in later]
        return readers, ""


def _tensors(node: fx.Node) -> Iterator[torch.Tensor]:
    for value in pytree.tree_leaves(node.meta.get("val")):
        if isinstance(value, torch.Tensor) and value.layout == torch.strided:
            yield value


def _storage(value: torch.Tensor) -> int:
    return int(value.untyped_storage()._cdata)


def _same_geometry(one: Any, other: torch.Tensor) -> bool:
    """Compare as text: comparing symbolic sizes as numbers would add guards."""
    return isinstance(one, torch.Tensor) and _geometry(one) == _geometry(other)


def _geometry(value: torch.Tensor) -> tuple[str, str, str, torch.dtype]:
    return str(tuple(value.shape)), str(value.stride()), str(value.storage_offset()), value.dtype


def _title(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _in_place(node: fx.Node, model: nn.Module, training: bool) -> _InPlace | None:
    if node.op == "call_module":
        return _of_module(node, model.get_submodule(str(node.target)), training)
    if node.op == "call_method":
        return _of_method(node)
    if node.op == "call_function":
        if isinstance(node.target, torch._ops.OpOverload):
            return _of_overload(node, node.target)
        return _of_function(node)
    return None


def _first(node: fx.Node) -> fx.Node | None:
    first = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
    return first if isinstance(first, fx.Node) else None


def _of_module(node: fx.Node, module: nn.Module, training: bool) -> _InPlace | None:
    written = _first(node)
    if not getattr(module, "inplace", False) or written is None or isinstance(module, _NEVER_IN_PLACE):
        return None
    known = _MODULES.get(type(module))
    if known is None or module._forward_hooks or module._forward_pre_hooks:
        return _InPlace(written, None)
    function, attributes = known
    kwargs = {name: getattr(module, name) for name in attributes}
    if function in _BY_MODE:
        kwargs["training"] = training
    return _InPlace(written, _Rewrite("call_function", function, (written,), kwargs))


def _of_method(node: fx.Node) -> _InPlace | None:
    name, written = str(node.target), _first(node)
    if not name.endswith("_") or name.endswith("__") or written is None:
        return None
    if name == "requires_grad_":
        return None
    pure = None
    if name not in _NOT_VALUES and hasattr(torch.Tensor, name[:-1]):
        pure = _Rewrite("call_method", name[:-1], node.args, dict(node.kwargs))
    return _InPlace(written, pure)


def _of_overload(node: fx.Node, target: torch._ops.OpOverload) -> _InPlace | None:
    schema = target._schema
    name = target._opname
    written = _first(node)
    if not name.endswith("_") or not schema.is_mutable or written is None:
        return None
    packet = getattr(getattr(torch.ops, target.namespace), name[:-1], None)
    overload = getattr(packet, target._overloadname, None)
    if overload is None or name in _NOT_VALUES - {"copy_"}:
        return _InPlace(written, None)
    return _InPlace(written, _Rewrite("call_function", overload, node.args, dict(node.kwargs)))


def _of_function(node: fx.Node) -> _InPlace | None:
    target: Any = node.target
    written = _first(node)
    if written is None:
        return None
    if target in IN_PLACE_OPERATORS:
        if not isinstance(written.meta.get("val"), torch.Tensor):
            return None
        return _InPlace(written, _Rewrite("call_function", IN_PLACE_OPERATORS[target], node.args, dict(node.kwargs)))
    if target is operator.setitem:
        return _InPlace(written, None)
    out = node.kwargs.get("out")
    if isinstance(out, fx.Node):
        return _InPlace(out, None)
    name = getattr(target, "__name__", "")
    home = F if hasattr(F, name) else torch
    if name.endswith("_") and not name.endswith("__") and getattr(home, name, None) is target:
        pure = getattr(home, name[:-1], None)
        return _InPlace(written, pure and _Rewrite("call_function", pure, node.args, dict(node.kwargs)))
    return _of_flag(node, target, written)


def _of_flag(node: fx.Node, target: Any, written: fx.Node) -> _InPlace | None:
    """Recognise ``F.relu(x, inplace=True)``, also with the flag given by position."""
    try:
        signature = inspect.signature(target)
        if "inplace" not in signature.parameters:
            return None
        bound = signature.bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):
        return None
    if not bound.arguments.get("inplace"):
        return None
    bound.arguments["inplace"] = False
    return _InPlace(written, _Rewrite("call_function", target, bound.args, bound.kwargs))
