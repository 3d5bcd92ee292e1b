"""Runs one region of an owner: as plain autograd, or lowered and rewritten, whichever the program asks for."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from e2pass.errors import LoweringError
from e2pass.lowering import ValueSpec, lower
from e2pass.lowering.joint import Joint
from e2pass.parameters import region_parameters
from e2pass.plan import Region
from e2pass.runtime.region import CompiledRegion, CountSink

Lookup = Callable[[str], Tensor]
_NORMS = (nn.modules.batchnorm._BatchNorm,)


class Updates(NamedTuple):
    """How a run of a region updates a running statistic: the momentum of its norm, and how often that is called."""

    momentum: float
    calls: int

    def kept(self, share: float) -> float:
        """The share of its old value that a run on ``share`` of the batch leaves of the statistic."""
        return 1.0 - share * (1.0 - (1.0 - self.momentum) ** self.calls)


class LoweringCache:
    """Compiled regions of one plan, shared by all copies of a model and dropped when it is pickled.

    A lowered graph bakes in the mode, which tensors want gradients, dtypes, devices and scalar settings of modules;
    the key holds all of them. The batch size is symbolic; the guards recorded while tracing are checked here, and a
    batch size that violates one gets a graph of its own.
    """

    def __init__(
        self,
        rewrites: Sequence[Callable[[Joint, bool], None]],
        opaque: Collection[str] = (),
        *,
        compile: bool = False,
    ) -> None:
        """Keep what every lowering goes through.

        Args:
            rewrites: Applied to each joint graph, in order.
            opaque: Regions that could not be lowered, as diagnostics say.
            compile: Compile quantizers and element-wise operators with inductor.
        """
        self.rewrites = tuple(rewrites)
        self.compile = compile
        self.entries: dict[tuple[Any, ...], list[CompiledRegion]] = {}
        self.failed = frozenset(opaque)
        self.refused: dict[tuple[Any, ...], str] = {}
        self.contiguous: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> LoweringCache:
        return self

    def find(self, key: tuple[Any, ...], batch: int, make: Callable[[], Joint], frozen: bool) -> CompiledRegion:
        """The compiled region for ``key`` that accepts ``batch``, lowered now if there is none."""
        if key in self.refused:
            raise LoweringError(self.refused[key])
        for candidate in self.entries.get(key, ()):
            if candidate.joint.accepts(batch):
                return candidate
        joint = make()
        for rewrite in self.rewrites:
            rewrite(joint, frozen)
        compiled = CompiledRegion(joint, compile=self.compile)
        self.entries.setdefault(key, []).append(compiled)
        return compiled


def bind_module(graph: fx.Graph, owner: nn.Module) -> fx.GraphModule:
    """A graph over the owner's own modules: their dicts are shared, so whatever is assigned later is seen."""
    shell = fx.GraphModule(owner, graph)
    for registry in ("_modules", "_parameters", "_buffers"):
        shell.__dict__[registry] = owner.__dict__[registry]
    return shell


class RegionRunner:
    """One region bound to one owner.

    Attributes:
        region: What to run.
        owner: Module whose parameters and buffers it uses.
        cache: Compiled forms; None runs the region as plain autograd.
        statistics: Running statistics that training updates, and how one run does it.
        share: The share of the batch that the last call updated running statistics by.
    """

    def __init__(self, region: Region, owner: nn.Module, cache: LoweringCache | None) -> None:
        self.region, self.owner, self.cache = region, owner, cache
        self.eager = bind_module(region.graph, owner)
        self.frozen = self._with_frozen_norms()
        roots = {n.target: owner.get_submodule(n.target) for n in region.graph.find_nodes(op="call_module")}
        self.modules = [m for root in roots.values() for m in root.modules()]
        self.norms = [m for m in self.modules if isinstance(m, _NORMS)]
        self.convolves = _convolves_images(region.graph, self.modules)
        self.parameters = [_slot(owner, name) for name in region_parameters(region, owner)]
        self.statistics = self._statistics()
        self._averaged: dict[str, bool] = {}
        self.share = 0.0

    def __call__(
        self,
        inputs: Sequence[Tensor],
        batch: int,
        share: float,
        overrides: dict[str, tuple[Tensor, Tensor]],
        on_counts: CountSink,
        on_scales: Callable[[str, Sequence[str], Sequence[Tensor]], None],
        *,
        precise: bool = False,
    ) -> tuple[Tensor, ...]:
        """Run on ``batch`` samples.

        Args:
            inputs: One per ``region.inputs``.
            batch: Samples in ``inputs``.
            share: ``batch`` over the samples of the whole batch; batch norms' momentum scales with it.
            overrides: For weights used in several regions, the aliases whose gradients are the full and the
                predicted one.
            on_counts: Receives a weight's selection counts in backward.
            on_scales: Receives the scales of this execution's activation quantizers.
            precise: Run as plain autograd this time.
        """
        frozen = self.region.needs_two and batch < 2
        self.share = 0.0 if frozen else share
        graph = self.frozen if frozen and self.frozen is not None else self.eager
        with self._norms_in_evaluation(frozen):
            # Of no sample there is no largest value, so nothing that a quantizer could scale by.
            if precise or batch == 0 or self.cache is None or self.region.name in self.cache.failed:
                return self._run_eager(graph, inputs, share)
            try:
                return self._run_lowered(self.cache, graph, inputs, batch, share, overrides, on_counts, on_scales)
            except LoweringError as error:
                results = self._run_eager(graph, inputs, share)  # fails too where it is the call that is wrong
                self._give_up(self.cache, graph, inputs, batch, error)
                return results

    def _give_up(
        self, cache: LoweringCache, graph: fx.GraphModule, inputs: Sequence[Tensor], batch: int, error: LoweringError
    ) -> None:
        """Run calls like this one as plain PyTorch from now on, and say so: no diagnostic of ``transform`` did."""
        layouts = {self._layouts(cache, inputs), (False,) * len(inputs)}
        refused = {self._key(graph, self._specs(inputs, batch, layout)) for layout in layouts}
        known = not refused.isdisjoint(cache.refused)
        cache.refused.update(dict.fromkeys(refused, str(error)))
        if not known:
            warnings.warn(f"region {self.region.name} runs in full precision: {error}", stacklevel=2)

    @contextmanager
    def _norms_in_evaluation(self, wanted: bool) -> Iterator[None]:
        """One value a channel has no variance: such a batch norm uses running statistics and updates nothing."""
        frozen = [m for m in self.norms if m.training] if wanted else []
        for module in frozen:
            module.training = False
        try:
            yield
        finally:
            for module in frozen:
                module.training = True

    def _with_frozen_norms(self) -> fx.GraphModule | None:
        """The same for batch norms that are operators of the graph; None where it has none in training mode."""
        if not self.region.needs_two or not _training_norms(self.region.graph):
            return None
        graph = copy.deepcopy(self.region.graph)
        for node in _training_norms(graph):
            node.args = (*node.args[:5], False, *node.args[6:])
        for node in list(graph.nodes):
            if node.target is torch.ops.aten.add_.Tensor and not node.users:
                graph.erase_node(node)
        return bind_module(graph, self.owner)

    def _statistics(self) -> dict[str, Updates]:
        found: dict[str, Updates] = {}
        for name, momentum in [*self._module_updates(), *self._functional_updates()]:
            found[name] = Updates(momentum, found[name].calls + 1 if name in found else 1)
        return found

    def _module_updates(self) -> Iterator[tuple[str, float]]:
        """Each call of a norm as a module: its running statistics and its momentum."""
        for node in self.region.graph.find_nodes(op="call_module"):
            for name, module in self.owner.get_submodule(node.target).named_modules(prefix=node.target):
                if isinstance(module, _NORMS) and module.running_mean is not None:
                    momentum = 1.0 if module.momentum is None else module.momentum
                    yield f"{name}.running_mean", momentum
                    yield f"{name}.running_var", momentum

    def _functional_updates(self) -> Iterator[tuple[str, float]]:
        for node in _training_norms(self.region.graph):
            for argument in node.args[3:5]:
                if isinstance(argument, fx.Node) and argument.op == "get_attr":
                    yield str(argument.target), float(node.args[6])  # type: ignore[arg-type]

    def _run_eager(self, graph: fx.GraphModule, inputs: Sequence[Tensor], share: float) -> tuple[Tensor, ...]:
        if share == 1.0 or not self.owner.training:
            result: tuple[Tensor, ...] = graph(*inputs)
            return result
        # The norms update stand-ins: autograd may have saved what they were given, and forbids changing that.
        slots = [_slot(self.owner, name) for name in self.statistics]
        originals = [registry[leaf] for registry, leaf in slots]
        for (registry, leaf), original in zip(slots, originals, strict=True):
            registry[leaf] = original.clone()
        try:
            result = graph(*inputs)
            with torch.no_grad():
                for (registry, leaf), original in zip(slots, originals, strict=True):
                    original.lerp_(registry[leaf], share)
        finally:
            for (registry, leaf), original in zip(slots, originals, strict=True):
                registry[leaf] = original
        return result

    def _run_lowered(
        self,
        cache: LoweringCache,
        graph: fx.GraphModule,
        inputs: Sequence[Tensor],
        batch: int,
        share: float,
        overrides: dict[str, tuple[Tensor, Tensor]],
        on_counts: CountSink,
        on_scales: Callable[[str, Sequence[str], Sequence[Tensor]], None],
    ) -> tuple[Tensor, ...]:
        training = self.owner.training
        compiled = self._find(cache, graph, inputs, batch)
        tensors = self.arguments(compiled, inputs, overrides)
        shadows = [overrides[name][1] for _, name in compiled.shadows]
        values, side = compiled(tensors, shadows, on_counts)
        with torch.no_grad():
            scales = []
            for (kind, name), value in zip(compiled.side_keys, side, strict=True):
                if kind == "scale":
                    scales.append(value)
                else:
                    _write(fetch(self.owner, name), value, share if self.averages(name) else 1.0)
            if scales and training:
                on_scales(self.region.name, compiled.joint.scales, scales)
        return tuple(values)

    def averages(self, name: str) -> bool:
        """Whether a buffer is a running statistic: its new value counts by the share of samples, others in full."""
        if name not in self._averaged:
            buffer = fetch(self.owner, name)
            self._averaged[name] = any(fetch(self.owner, other) is buffer for other in self.statistics)
        return self._averaged[name]

    def prepared(self, inputs: Sequence[Tensor], batch: int) -> CompiledRegion | None:
        """The compiled form a call with these inputs runs, lowered now if need be; None where it runs as autograd."""
        if self.cache is None or self.region.name in self.cache.failed:
            return None
        try:
            return self._find(self.cache, self.eager, inputs, batch)
        except LoweringError as error:
            self._give_up(self.cache, self.eager, inputs, batch, error)
            return None

    def arguments(
        self,
        compiled: CompiledRegion,
        inputs: Sequence[Tensor],
        overrides: Mapping[str, tuple[Tensor, Tensor]] = MappingProxyType({}),
    ) -> list[Tensor]:
        """One tensor per forward input of ``compiled``; activations in the memory order that it was traced for."""
        layouts = self._layouts(self.cache, inputs) if self.cache is not None else (False,) * len(inputs)
        tensors = []
        for kind, name in compiled.halves.forward_inputs:
            if kind == "input":
                tensors.append(_arranged(inputs[name], layouts[name]))
            elif kind == "scale":
                tensors.append(self._running_scale(name))
            elif kind == "step":
                tensors.append(self.owner.e2_steps.count.clone())  # type: ignore[union-attr, operator]  # backward reads it later
            else:
                tensors.append(overrides[name][0] if name in overrides else fetch(self.owner, name))
        return tensors

    def _find(
        self, cache: LoweringCache, graph: fx.GraphModule, inputs: Sequence[Tensor], batch: int
    ) -> CompiledRegion:
        plain, layouts = (False,) * len(inputs), self._layouts(cache, inputs)
        if layouts == plain:
            return self._compiled(cache, graph, inputs, batch, plain)
        try:
            return self._compiled(cache, graph, inputs, batch, layouts)
        except LoweringError:  # it may look at strides: a view of what would have to be copied first
            compiled = self._compiled(cache, graph, inputs, batch, plain)
            cache.contiguous.add(self.region.name)
            return compiled

    def _layouts(self, cache: LoweringCache, inputs: Sequence[Tensor]) -> tuple[bool, ...]:
        """Which inputs a call takes with the channels last: images where it convolves, elsewhere what comes so."""
        if self.region.name in cache.contiguous:
            return (False,) * len(inputs)
        return tuple(t.dim() == 4 and (self.convolves or _channels_last(t)) for t in inputs)

    def _compiled(
        self,
        cache: LoweringCache,
        graph: fx.GraphModule,
        inputs: Sequence[Tensor],
        batch: int,
        layouts: tuple[bool, ...],
    ) -> CompiledRegion:
        specs = self._specs(inputs, batch, layouts)
        frozen = not self.owner.training
        return cache.find(self._key(graph, specs), batch, lambda: self.lower(specs, batch, graph.graph), frozen)

    def _key(self, graph: fx.GraphModule, specs: tuple[ValueSpec, ...]) -> tuple[Any, ...]:
        """Everything that a lowering for these inputs bakes in."""
        frozen = not self.owner.training  # of its own in the key: a region that calls no module bakes in no mode
        return self.region.name, frozen, graph is self.frozen, specs, self._baked()

    def lower(self, specs: Sequence[ValueSpec], batch: int, graph: fx.Graph | None = None) -> Joint:
        """The region's joint graph, before any rewrite."""
        if any(not isinstance(node.meta.get("val"), Tensor) for node in self._boundary()):
            raise LoweringError("a value that crosses the region's boundary is no tensor")
        return lower(fx.GraphModule(self.owner, graph or self.region.graph), specs, batch)

    def _boundary(self) -> Iterator[fx.Node]:
        yield from self.region.graph.find_nodes(op="placeholder")
        yield from self.region.graph.output_node().all_input_nodes

    def _specs(self, inputs: Sequence[Tensor], batch: int, layouts: tuple[bool, ...]) -> tuple[ValueSpec, ...]:
        """The planned specs with the gradients this call wants; plain sizes where the call's shapes are others."""
        specs = []
        grad = torch.is_grad_enabled()
        for tensor, planned, layout in zip(inputs, self.region.specs, layouts, strict=True):
            fits = tuple(tensor.shape) == planned.concrete(batch) and tensor.dtype == planned.dtype
            shape = planned.shape if fits else tuple(tensor.shape)
            wants = (tensor.requires_grad and grad) or (not grad and planned.requires_grad)
            specs.append(ValueSpec(shape, tensor.dtype, wants and tensor.is_floating_point(), layout))
        return tuple(specs)

    def _baked(self) -> tuple[Any, ...]:
        settings = tuple((m.training, getattr(m, "momentum", None), getattr(m, "p", None)) for m in self.modules)
        parameters = [registry[leaf] for registry, leaf in self.parameters]
        return settings, tuple((p.requires_grad, p.dtype, p.device) for p in parameters)

    def _running_scale(self, name: str) -> Tensor:
        return self.owner.e2_scales.get(self.region.name, name)  # type: ignore[union-attr, no-any-return, operator]


def _channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def _arranged(tensor: Tensor, channels_last: bool) -> Tensor:
    """The tensor in the memory order that its region was traced with: views in the graph hold for no other."""
    return tensor.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _convolves_images(graph: fx.Graph, modules: Sequence[nn.Module]) -> bool:
    if any(isinstance(m, nn.Conv2d | nn.ConvTranspose2d) for m in modules):
        return True
    convolutions = {torch.conv2d, torch.conv_transpose2d, torch.ops.aten.conv2d.default, torch.ops.aten.conv2d.padding}
    return any(n.op == "call_function" and n.target in convolutions for n in graph.nodes)


def _training_norms(graph: fx.Graph) -> list[fx.Node]:
    norms = graph.find_nodes(op="call_function", target=torch.ops.aten.batch_norm.default)
    return [n for n in norms if n.args[5]]


def _slot(owner: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """The registry that holds a parameter or buffer, and its key there."""
    *path, leaf = name.split(".")
    module: Any = owner
    for part in path:
        module = module._modules[part]
    return (module._parameters if module._parameters.get(leaf) is not None else module._buffers), leaf


def fetch(owner: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its name, or the tensor that stands in for it."""
    registry, leaf = _slot(owner, name)
    tensor: Tensor = registry[leaf]
    return tensor


def _write(buffer: Tensor, value: Tensor, share: float) -> None:
    """Store a buffer's new value by its share."""
    if share != 1.0:
        buffer.lerp_(value, share)
    else:
        buffer.copy_(value)
