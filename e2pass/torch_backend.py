"""A backend of ``torch.compile``: low precision and PSG for a model that nobody transformed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from e2pass.compiler import require_compiler
from e2pass.config import PSG, Bits
from e2pass.errors import ConfigError, LoweringError
from e2pass.lowering import ValueSpec, lower
from e2pass.passes.predict_signs import PredictSignsJoint
from e2pass.passes.quantize import QuantizeJoint
from e2pass.runtime.region import CompiledRegion

Backend = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]


def psg_backend(psg: PSG | None = None, bits: Bits | None = None, *, compile: bool = False) -> Backend:
    """A backend that trains with 8/8/16-bit operands and predicted signs: ``torch.compile(model, backend=...)``.

    Each graph that ``torch.compile`` captures is lowered and rewritten as a region of a transformed model is. Where it
    splits a model in several graphs that use the same weight, each signs its own part of the gradient. The backend
    keeps no state: activations are quantized with the scale of their own batch in evaluation, too.

    Args:
        psg: Options of PSG, default ``PSG()``.
        bits: Operand widths, default ``Bits()``.
        compile: Compile quantizers and element-wise operators with inductor.

    Raises:
        ConfigError: For options that need names of parameters or a state, and for ``compile`` without a compiler.
    """
    psg, bits = psg or PSG(), bits or Bits()
    for option, value in {
        "PSG.exclude": psg.exclude, "PSG.warmup": psg.warmup, "PSG.stats": psg.stats, "Bits.exclude": bits.exclude,
        "Bits.rounding": bits.rounding == "stochastic",
    }.items():  # fmt: skip
        if value:
            raise ConfigError(f"{option} needs names or a state that psg_backend has not; use e2pass.transform")
    if compile and bits.bit_true:
        raise ConfigError("compile=True may contract products and sums, so it does not go with Bits(bit_true=True)")
    if compile:
        require_compiler()

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        return _CompiledGraph(gm, example_inputs, QuantizeJoint(bits), PredictSignsJoint(psg), compile)

    return backend


class _CompiledGraph:
    """One captured graph, lowered for each combination of shapes, types and wanted gradients it is called with."""

    def __init__(
        self,
        gm: fx.GraphModule,
        examples: Sequence[Any],
        quantize: QuantizeJoint,
        predict: PredictSignsJoint,
        compile: bool,
    ) -> None:
        self.gm, self.quantize, self.predict, self.compile = gm, quantize, predict, compile
        names = [str(n.target) for n in gm.graph.find_nodes(op="placeholder")]
        self.kinds = [_kind(name, example) for name, example in zip(names, examples, strict=True)]
        self.regions: dict[Any, tuple[CompiledRegion, list[Any]] | None] = {}

    def __call__(self, *args: Any) -> Any:
        key = (torch.is_grad_enabled(), tuple(map(_describe, args)))
        if key not in self.regions:
            self.regions[key] = self._lower(args)
        found = self.regions[key]
        if found is None:
            return self.gm(*args)
        region, layout = found
        given = {(kind, i): arg for i, (kind, arg) in enumerate(zip(self.kinds, args, strict=True))}
        order = [i for i, kind in enumerate(self.kinds) if kind == "input"]
        tensors = [
            given["input", order[name]] if kind == "input" else given[kind, int(name[1:])]
            for kind, name in region.halves.forward_inputs
        ]
        values, side = region(tensors, [], _ignore)
        with torch.no_grad():
            for (kind, name), value in zip(region.side_keys, side, strict=True):
                if kind == "mutation":
                    given["buffer", int(name[1:])].copy_(value)
        outputs = iter(values)
        return tuple(next(outputs) if item is _TENSOR else item for item in layout)

    def _lower(self, args: Sequence[Any]) -> tuple[CompiledRegion, list[Any]] | None:
        """The region for arguments like these; None, with a warning, where there can be none."""
        if not any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return None  # nothing here trains
        try:
            holder, graph, specs, layout = self._over_parameters(args)
            joint = lower(fx.GraphModule(holder, graph), specs, batch=2)
        except LoweringError as error:
            warnings.warn(f"a graph of torch.compile runs in full precision: {error}", stacklevel=2)
            return None
        self.quantize(joint, False)
        self.predict(joint, False)
        return CompiledRegion(joint, compile=self.compile), layout

    def _over_parameters(self, args: Sequence[Any]) -> tuple[nn.Module, fx.Graph, list[ValueSpec], list[Any]]:
        """The graph with its parameters in a module instead of among its inputs, and with its sizes as numbers."""
        holder, graph = nn.Module(), fx.Graph()
        for name, module in self.gm.named_children():
            holder.add_module(name, module)
        specs: list[ValueSpec] = []
        known: dict[fx.Node, Any] = {}
        inputs = self.gm.graph.find_nodes(op="placeholder")
        for i, (node, kind, arg) in enumerate(zip(inputs, self.kinds, args, strict=True)):
            if kind == "param":
                holder.register_parameter(f"p{i}", arg)
            elif kind == "buffer":
                holder.register_buffer(f"b{i}", arg)
            elif kind == "input":
                known[node] = graph.placeholder(f"input_{i}")
                specs.append(_spec(arg))
            else:
                known[node] = arg
        for i, (node, kind) in enumerate(zip(inputs, self.kinds, strict=True)):
            if kind in ("param", "buffer"):
                known[node] = graph.get_attr(f"{kind[0]}{i}")
        for node in self.gm.graph.nodes:
            if node.op not in ("placeholder", "output"):
                known[node] = graph.node_copy(node, known.__getitem__)
        returned: Any = self.gm.graph.output_node().args[0]
        values = [known[v] if isinstance(v, fx.Node) else v for v in returned]
        graph.output(tuple(v for v in values if isinstance(v, fx.Node)))
        return holder, graph, specs, [_TENSOR if isinstance(v, fx.Node) else v for v in values]


_TENSOR = object()


def _kind(name: str, example: Any) -> str:
    if not isinstance(example, Tensor):
        return "number"
    if isinstance(example, nn.Parameter):
        return "param"
    return "buffer" if "_buffers_" in name else "input"


def _describe(arg: Any) -> Any:
    if not isinstance(arg, Tensor):
        return arg
    return tuple(arg.shape), arg.stride(), arg.dtype, arg.device, arg.requires_grad


def _spec(tensor: Tensor) -> ValueSpec:
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    return ValueSpec(tuple(tensor.shape), tensor.dtype, tensor.requires_grad, last)


def _ignore(*_: Any) -> None:
    """Nothing is counted."""
