"""Lowering: the joint forward+backward ATen graph of a region, by AOTAutograd, with a symbolic batch size.

This is the one module that touches torch's experimental joint-graph interface.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
import torch.fx.traceback
from torch import fx, nn
from torch._functorch import aot_autograd
from torch._functorch._aot_autograd import descriptors as desc
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from e2pass.errors import LoweringError
from e2pass.lowering.canonical import canonicalize

BATCH = sympy.Symbol("B", positive=True, integer=True)

if not hasattr(aot_autograd, "aot_export_joint_with_descriptors"):
    raise ImportError(
        f"torch {torch.__version__} has no aot_export_joint_with_descriptors, which lowering needs; install torch>=2.13"
    )


@dataclass(frozen=True)
class ValueSpec:
    """A tensor that enters a region: shape in terms of the batch size, dtype, and whether its gradient is wanted.

    Attributes:
        shape: Each dimension an int or a sympy expression of ``BATCH``.
        dtype: Element type.
        requires_grad: Whether backward must produce its gradient.
        channels_last: Whether its memory holds the channels of a pixel side by side (four dimensions only).
    """

    shape: tuple[int | sympy.Expr, ...]
    dtype: torch.dtype
    requires_grad: bool = False
    channels_last: bool = False

    def concrete(self, batch: int) -> tuple[int, ...]:
        """Return the shape at a batch size."""
        return tuple(d if isinstance(d, int) else int(d.subs(BATCH, batch)) for d in self.shape)


@dataclass
class Joint:
    """A joint graph: placeholders are the region's state and inputs and the tangents of its outputs.

    Attributes:
        graph_module: The flat graph; its output node holds one list.
        inputs: For each placeholder ``(kind, key)``: ``("param", target)``, ``("buffer", target)``, ``("input", i)``,
            ``("tangent", i)`` of output ``i``, or, added by the quantize pass, ``("scale", name)`` of a quantizer and
            ``("step", "")``, the number of the training step.
        outputs: For each output ``(kind, key)``: ``("output", i)``, ``("mutation", buffer)``, ``("grad", input)`` with
            ``input`` an entry of ``inputs``, ``("scale", i)``, ``("predicted", param)`` or ``("counts", param)``
            (added by quantize and PSG).
        batch: Batch size whose hints were used while tracing.
        symbol: Sympy symbol of the batch in the graph's shapes and guards.
        guards: Conditions on the batch size under which the graph is valid.
        fixed: Whether it is valid for ``batch`` only: an operator asked for the number.
        scales: Names of the activation quantizers, in the order of their ``("scale", i)``.
        notes: What the rewriting passes want to say about this joint graph.
    """

    graph_module: fx.GraphModule
    inputs: list[tuple[str, Any]]
    outputs: list[tuple[str, Any]]
    batch: int
    symbol: sympy.Symbol
    guards: list[Any]
    fixed: bool = False
    scales: list[str] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def graph(self) -> fx.Graph:
        """The joint graph."""
        return self.graph_module.graph

    def accepts(self, batch: int) -> bool:
        """Whether every guard recorded while tracing holds for ``batch``; the compiled callable checks none."""
        return all(bool(guard.subs(self.symbol, batch)) for guard in self.guards)

    def output_nodes(self) -> list[Any]:
        """The values of the output node, in the order of ``outputs``."""
        values: Any = self.graph.output_node().args[0]
        return list(values)

    def set_outputs(self, nodes: Sequence[Any], outputs: Sequence[tuple[str, Any]]) -> None:
        """Replace the output list."""
        self.graph.output_node().args = (list(nodes),)
        self.outputs = list(outputs)

    def copy(self, inputs: Sequence[tuple[str, Any]] | None = None) -> Joint:
        """A copy whose graph can be rewritten apart, perhaps with other names of inputs; fake values are shared."""
        keys = list(self.inputs if inputs is None else inputs)
        graph = fx.Graph()
        nodes: dict[fx.Node, fx.Node] = {}
        for old, key in zip(self.graph.find_nodes(op="placeholder"), keys, strict=True):
            name = old.name if inputs is None else _placeholder(*key)
            nodes[old] = graph.create_node("placeholder", f"arg_{len(nodes)}", name=name)
        graph.output(graph.graph_copy(self.graph, nodes))
        for old, new in nodes.items():
            new.meta = dict(old.meta)
        return replace(
            self,
            graph_module=fx.GraphModule(self.graph_module, graph),
            inputs=keys,
            outputs=list(self.outputs),
            scales=list(self.scales),
            notes=dict(self.notes),
        )


def _placeholder(kind: str, key: Any) -> str:
    """What a placeholder is called: after what it stands for."""
    return str(key).replace(".", "_") if kind in ("param", "buffer") else f"{kind}_{key}"


class _Interpreted(nn.Module):
    """A graph module run node by node, so that each traced operation knows the node it came from."""

    _interpreter: fx.Interpreter

    def __init__(self, gm: fx.GraphModule, clone_outputs: bool) -> None:
        super().__init__()
        self.clone_outputs = clone_outputs
        self.outputs_want_grad: list[bool] = []
        for node in gm.graph.nodes:  # torch records where a node came from only if it has some metadata
            node.meta.setdefault("e2_path", "")
        # The same dicts, so that the interpreter sees the tensors that AOTAutograd puts in place of the parameters.
        for registry in ("_modules", "_parameters", "_buffers"):
            self.__dict__[registry] = gm.__dict__[registry]
        object.__setattr__(self, "_interpreter", fx.Interpreter(gm))

    def forward(self, *args: torch.Tensor) -> Any:
        with fx.traceback.preserve_node_meta():
            outputs = self._interpreter.run(*args)
        if self.clone_outputs:
            outputs = tuple(o.clone() for o in outputs)
        self.outputs_want_grad = [o.requires_grad for o in outputs]
        return outputs


def trace_joint(module: fx.GraphModule, specs: Sequence[ValueSpec], batch: int) -> Joint:
    """Trace ``module`` forward and backward into one ATen graph with a symbolic batch size.

    Every node of the result carries ``meta["e2_from"]``: the name of the node of ``module`` it was traced from, for
    backward nodes the one whose gradient they compute.

    Args:
        module: Region over the owner's own parameters, with only those that it uses; returns a tuple of tensors.
        specs: Its positional inputs.
        batch: Batch size used as the hint; values 0 and 1 are traced as 2, and guards say whether 1 is allowed. Where
            an operator fixes the size, 1 has a graph of its own.

    Raises:
        LoweringError: When tracing fails; the message carries torch's own reason.
    """
    onednn = _without_onednn() if _has_recurrent_layer(module) else contextlib.nullcontext()
    with onednn, disable_proxy_modes_tracing(), unset_fake_temporarily():  # a caller may be tracing itself
        joint = _trace_or_clone(module, specs, max(batch, 2))
        if batch == 1 and joint.fixed:
            joint = _trace_or_clone(module, specs, 1)
    for node, key in zip(joint.graph.find_nodes(op="placeholder"), joint.inputs, strict=True):
        node._rename(_placeholder(*key))
    _trace_provenance(joint.graph)
    canonicalize(joint.graph)
    joint.graph_module.recompile()
    return joint


def _trace_or_clone(module: fx.GraphModule, specs: Sequence[ValueSpec], batch: int) -> Joint:
    joint = _trace(module, specs, batch, clone_outputs=False)
    if joint is None:
        joint = _trace(module, specs, batch, clone_outputs=True)
    if joint is None:
        raise LoweringError("lowering failed: an output aliases an input in a way that cloning it does not undo")
    return joint


_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}


@contextlib.contextmanager
def _without_onednn() -> Iterator[None]:
    # torch.backends.mkldnn.flags would also touch (and warn about) settings of other devices.
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


@contextlib.contextmanager
def _without_tracebacks() -> Iterator[None]:
    """An operator that refuses its operands is an error, whose message says all; torch also logs where it came from."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


def _has_recurrent_layer(module: fx.GraphModule) -> bool:
    """OneDNN's fused recurrent layer keeps a workspace only under autograd and cannot be cut into two halves.

    It stands for a layer as a module, or for its function where the model was captured by torch.export.
    """
    functions = (node.target for node in module.graph.nodes if node.op == "call_function")
    return any(isinstance(m, nn.RNNBase) for m in module.modules()) or any(
        getattr(target, "__name__", "").partition(".")[0] in _RECURRENT for target in functions
    )


def _trace(module: fx.GraphModule, specs: Sequence[ValueSpec], batch: int, *, clone_outputs: bool) -> Joint | None:
    """One attempt; None where AOTAutograd left the gradient of an aliasing output to its own runtime wrapper."""
    shape_env = ShapeEnv()
    mode = FakeTensorMode(shape_env=shape_env, allow_non_fake_inputs=True)
    size = _symbolic_batch(mode, batch)
    # A trace that fixes the batch size replaces its symbol by a number, and a size of 1 is one from the start.
    symbol = size.node.expr if isinstance(size, torch.SymInt) else BATCH
    wrapped = _Interpreted(module, clone_outputs)
    with contextlib.ExitStack() as stack:
        try:
            with mode, torch.enable_grad(), _without_tracebacks():
                args = tuple(_fake_input(spec, size) for spec in specs)
                exported = aot_autograd.aot_export_joint_with_descriptors(stack, wrapped, args)
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise LoweringError(f"lowering failed: {type(error).__name__}: {reason[0]}") from error
        described = [*exported.graph_module.graph.output_node().meta["desc"]]
        if not clone_outputs and any(isinstance(d, desc.IntermediateBaseAOTOutput) for d in described):
            return None
        joint = _describe(exported.graph_module, batch, symbol, shape_env)
    tangents = {key for kind, key in joint.inputs if kind == "tangent"}
    wanted = {i for i, wants in enumerate(wrapped.outputs_want_grad) if wants}
    return None if wanted - tangents else joint


def _trace_provenance(graph: fx.Graph) -> None:
    """Forward nodes remember the interpreted node; backward nodes share autograd's sequence number with it."""
    by_sequence: dict[int, str] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        sequence = node.meta.get("seq_nr")
        if node.meta.get("from_node") and not node.meta.get("autograd_backward"):
            node.meta["e2_from"] = node.meta["from_node"][-1].name
            if sequence is not None:
                by_sequence.setdefault(sequence, node.meta["e2_from"])
        else:
            node.meta["e2_from"] = by_sequence.get(sequence, "")


def _symbolic_batch(mode: FakeTensorMode, batch: int) -> torch.SymInt | int:
    context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    size: torch.SymInt | int = mode.from_tensor(torch.empty(batch), symbolic_context=context).shape[0]
    return size


def _fake_input(spec: ValueSpec, size: Any) -> torch.Tensor:
    def dim(d: int | sympy.Expr) -> Any:
        return d if isinstance(d, int) else sympy.lambdify(BATCH, d, "math")(size)

    layout = torch.channels_last if spec.channels_last else torch.contiguous_format
    tensor = torch.empty([dim(d) for d in spec.shape], dtype=spec.dtype, memory_format=layout)
    return tensor.requires_grad_(spec.requires_grad)


def _describe(gm: fx.GraphModule, batch: int, symbol: sympy.Symbol, env: ShapeEnv) -> Joint:
    """Translate torch's descriptors and flatten the pytree calling convention into plain placeholders."""
    gm.graph.set_codegen(fx.graph.CodeGen())
    inputs = [_input(node.meta["desc"]) for node in gm.graph.find_nodes(op="placeholder")]
    output = gm.graph.output_node()
    values, described = [], []
    for value, d in zip(output.args[0], output.meta["desc"], strict=True):  # type: ignore[arg-type]
        if value is not None and d is not None:
            values.append(value)
            described.append(_output(d))
    baked = [n.target for n in gm.graph.find_nodes(op="get_attr") if isinstance(getattr(gm, n.target), nn.Parameter)]
    if baked:
        raise LoweringError(f"lowering failed: {len(baked)} parameters were traced as constants")
    fixed = symbol is BATCH or symbol in env.replacements
    guards = [sympy.Eq(symbol, batch)] if fixed else [g.expr for g in env.guards]
    joint = Joint(gm, inputs, described, batch, symbol, guards, fixed)
    joint.set_outputs(values, described)
    return joint


def _input(d: desc.AOTInput) -> tuple[str, Any]:
    match d:
        case desc.ParamAOTInput(target=target):
            return ("param", target)
        case desc.BufferAOTInput(target=target):
            return ("buffer", target)
        case desc.PlainAOTInput(idx=idx):
            return ("input", idx)
        case desc.TangentAOTInput(output=desc.PlainAOTOutput(idx=idx)):
            return ("tangent", idx)
    raise LoweringError(f"lowering met an input it does not know, {d}; such a region runs as it is, unlowered")


_OUTPUTS: dict[type[desc.AOTOutput], Callable[[Any], tuple[str, Any]]] = {
    desc.PlainAOTOutput: lambda d: ("output", d.idx),
    desc.GradAOTOutput: lambda d: ("grad", _input(d.grad_of)),
}


def _output(d: desc.AOTOutput) -> tuple[str, Any]:
    if isinstance(d, desc.InputMutationAOTOutput):
        kind, key = _input(d.mutated_input)
        if kind == "buffer":
            return ("mutation", key)
    if type(d) in _OUTPUTS:
        return _OUTPUTS[type(d)](d)
    raise LoweringError(f"lowering met an output it does not know, {d}; such a region runs as it is, unlowered")
