"""Lowering once for regions that differ in names only: the blocks of a stage, or a region that is lowered again.

Two regions share a joint graph if their graphs, the settings of the modules they call, the shapes and types of their
parameters and inputs, and torch's own settings are equal. What cannot be compared is not shared: modules that are not
torch's own (their behaviour may rest on anything), hooks, constants.
"""

from __future__ import annotations

import types
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from e2pass.lowering.joint import Joint, ValueSpec, trace_joint

CAPACITY = 256
"""Joint graphs kept; the least recently used one goes first."""


class _Incomparable(Exception):
    """Something whose equality with something else cannot be decided."""


@dataclass(frozen=True)
class Signature:
    """What a region's joint graph depends on.

    Attributes:
        key: Equal for regions that have the same joint graph but for names.
        attributes: Names of its parameters and buffers, in an order that ``key`` fixes.
        nodes: Names of its graph's nodes, likewise.
    """

    key: Hashable
    attributes: tuple[str, ...]
    nodes: tuple[str, ...]


class JointMemo:
    """Joint graphs by signature."""

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, list[tuple[Joint, Signature]]] = OrderedDict()

    def find(self, signature: Signature, module: fx.GraphModule, batch: int) -> Joint | None:
        """A copy, under the names of ``module``, of a joint graph known to be valid for ``batch``."""
        for joint, known in self._known.get(signature.key, ()):
            if joint.accepts(batch):
                self._known.move_to_end(signature.key)
                return _renamed(joint, known, signature, module)
        return None

    def add(self, signature: Signature, joint: Joint) -> None:
        """Keep a copy of ``joint``: its owner rewrites it in place."""
        if not _names(joint) <= set(signature.attributes):
            return  # it reads something under a name that the signature does not list
        self._known.setdefault(signature.key, []).append((joint.copy(), signature))
        while len(self._known) > CAPACITY:
            self._known.popitem(last=False)


_MEMO = JointMemo()


def lower(module: fx.GraphModule, specs: Sequence[ValueSpec], batch: int) -> Joint:
    """The joint forward+backward graph of a region, traced only where no equal one is known; see ``trace_joint``.

    Raises:
        LoweringError: When tracing fails.
    """
    signature = signature_of(module, specs)
    known = None if signature is None else _MEMO.find(signature, module, batch)
    if known is not None:
        return known
    joint = trace_joint(module, specs, batch)
    if signature is not None:
        _MEMO.add(signature, joint)
    return joint


def _names(joint: Joint) -> set[str]:
    return {key for kind, key in (*joint.inputs, *joint.outputs) if kind in ("param", "buffer", "mutation")}


def signature_of(module: fx.GraphModule, specs: Sequence[ValueSpec]) -> Signature | None:
    """The signature of a region, None if it holds something that cannot be compared."""
    reader = _Reader(module)
    try:
        nodes = tuple(reader.node(n) for n in module.graph.nodes)
        key = (nodes, tuple(specs), _torch_settings())
        hash(key)
    except (_Incomparable, TypeError):
        return None
    return Signature(key, tuple(reader.attributes), tuple(n.name for n in module.graph.nodes))


def _torch_settings() -> Hashable:
    return (
        torch.get_default_dtype(),
        tuple((k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in ("cpu", "cuda")),
        torch._C._get_mkldnn_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
    )


_PLAIN = (
    bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.memory_format, torch.layout,
    types.FunctionType, types.BuiltinFunctionType,
)  # fmt: skip
_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


class _Reader:
    """Turns a graph and the modules it calls into something hashable, and lists names in the order met."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.positions: dict[fx.Node, int] = {}
        self.attributes: list[str] = []
        self.identities: dict[int, int] = {}

    def node(self, node: fx.Node) -> Hashable:
        self.positions[node] = len(self.positions)
        return node.op, self._target(node), self._plain(node.args), self._plain(node.kwargs)

    def _target(self, node: fx.Node) -> Hashable:
        if node.op == "call_module":
            return self._module(self.module.get_submodule(str(node.target)), str(node.target))
        if node.op == "get_attr":
            path, _, leaf = str(node.target).rpartition(".")
            owner = self.module.get_submodule(path)
            registered = owner._parameters if leaf in owner._parameters else owner._buffers
            return self._tensor(registered.get(leaf), str(node.target))
        return "" if node.op in ("placeholder", "output") else node.target

    def _module(self, module: nn.Module, path: str) -> Hashable:
        if not type(module).__module__.startswith("torch.nn.modules.") or any(vars(module).get(h) for h in _HOOKS):
            raise _Incomparable
        settings = tuple((k, self._plain(v)) for k, v in sorted(vars(module).items()) if not k.startswith("_"))
        tensors = tuple(
            None if t is None else (name, self._tensor(t, f"{path}.{name}"))
            for name, t in (*module._parameters.items(), *module._buffers.items())
        )
        children = tuple((n, self._module(m, f"{path}.{n}")) for n, m in module._modules.items() if m is not None)
        return type(module), settings, tensors, children

    def _tensor(self, tensor: Tensor | None, name: str) -> Hashable:
        if type(tensor) not in (Tensor, nn.Parameter):
            raise _Incomparable
        assert tensor is not None
        self.attributes.append(name)
        which = self.identities.setdefault(id(tensor), len(self.identities))
        shape, stride = tuple(tensor.shape), tensor.stride()
        return which, type(tensor), shape, stride, tensor.dtype, tensor.device, tensor.requires_grad

    def _plain(self, value: Any) -> Hashable:
        if isinstance(value, fx.Node):
            return fx.Node, self.positions[value]
        if isinstance(value, list | tuple):
            return type(value), tuple(self._plain(v) for v in value)
        if isinstance(value, dict):
            return dict, tuple((k, self._plain(v)) for k, v in value.items())
        if isinstance(value, slice):
            return slice, self._plain((value.start, value.stop, value.step))
        if type(value) in _PLAIN:
            return type(value), value  # with its type, as True equals 1 and 1 equals 1.0
        raise _Incomparable


def _renamed(joint: Joint, known: Signature, wanted: Signature, module: fx.GraphModule) -> Joint:
    """A copy of ``joint`` in which attributes and the nodes it was traced from have the names of another region."""
    attributes = dict(zip(known.attributes, wanted.attributes, strict=True))
    nodes = dict(zip(known.nodes, wanted.nodes, strict=True))
    origins = {n.name: n for n in module.graph.nodes}

    def key(kind: str, name: Any) -> tuple[str, Any]:
        if kind == "grad":
            return kind, key(*name)
        return kind, attributes[name] if kind in ("param", "buffer", "mutation") else name

    copy = joint.copy([key(*k) for k in joint.inputs])
    copy.outputs = [key(*k) for k in joint.outputs]
    for node in copy.graph.nodes:
        if "e2_from" in node.meta:
            _set_origin(node, nodes.get(node.meta["e2_from"], ""), origins)
    copy.graph_module.recompile()
    return copy


_PROVENANCE = ("stack_trace", "nn_module_stack")


def _set_origin(node: fx.Node, origin: str, origins: dict[str, fx.Node]) -> None:
    node.meta["e2_from"] = origin
    for name in ("from_node", *_PROVENANCE):
        node.meta.pop(name, None)
    if origin in origins:
        meta = origins[origin].meta
        node.meta.update({name: meta[name] for name in _PROVENANCE if name in meta})
