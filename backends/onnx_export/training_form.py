"""One training step as one function of tensors, traced from the code that trains in PyTorch.

The gates, the merges, the regions' halves, the sums of shared gradients and the loss are executed as they are, under a
tracer; only the bodies of gated blocks stay opaque (``opaque``). So the traced step is the runtime's, by construction.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from e2pass.backends.onnx_export.decompositions import IN_PLACE
from e2pass.backends.onnx_export.files import first_line, input_names
from e2pass.backends.onnx_export.opaque import Body, MergeWhole, RunBody
from e2pass.backends.onnx_export.update import Update, state_tensors
from e2pass.capture.output import opened
from e2pass.errors import E2PassError, ExportError, InputError, LoweringError
from e2pass.parameters import parameter_names, region_parameters
from e2pass.plan import Decide, Region, RunRegion, Skip
from e2pass.runtime.gates import Gate, SLUGates, keep_finite
from e2pass.runtime.merge import merge_masked
from e2pass.runtime.module import E2Module, SelectionCounts
from e2pass.runtime.runner import LoweringCache, RegionRunner
from e2pass.step.side_graphs import check_loss

Loss = Callable[..., Tensor]

NEXT, GRADIENT, LOSS, TARGET = "next.", "grad.", "loss", "target"
"""Before an input's name: the output that holds its new value, and its gradient. The other names of the step's own."""


@dataclass(frozen=True)
class TracedStep:
    """The step as a flat graph.

    Attributes:
        graph: Functional graph; placeholders as ``inputs``, outputs as ``outputs``.
        inputs: Name of each input: the batch's, ``lr.*``, parameters, buffers, optimizer states.
        outputs: Name of each output: ``loss``, or the input whose new value it is.
        state: Present value of each input that is no part of the batch.
    """

    graph: fx.GraphModule
    inputs: list[str]
    outputs: list[str]
    state: dict[str, Tensor]


class TrainingForm:
    """Executes the training plan of a copy of a transformed model, with the tensors it is given."""

    def __init__(self, module: E2Module, loss: Loss | None, update: Update, gradients: bool = False) -> None:
        self.twin = copy.deepcopy(module).train()
        self.loss, self.update, self.gradients = loss, update, gradients
        self.canonical = parameter_names(self.twin)
        self.runners = _plain_runners(self.twin)
        self.plan = self.twin._executable.plans["train"]
        self.bodies: dict[str, Body] = {}
        if self.twin._warming():
            raise ExportError(
                "the model is still in PSG's warm-up, whose steps are of another kind; train past it, load such a "
                "checkpoint, or transform with warmup=0"
            )
        object.__setattr__(self.twin, "_warming", bool)  # False, without a look at the counter while tracing
        if self.twin.e2_slu is not None:
            _check_gates(self.twin.e2_slu)

    def trace(self, tensors: Sequence[Tensor], target: Tensor | None) -> TracedStep:
        """Trace the step at the batch size of ``tensors``, after ``prepare`` and among ``opaque.traced`` bodies.

        Args:
            tensors: One per input of the plan.
            target: Second argument of the loss; None where the model returns its loss itself.
        """
        if target is not None and not isinstance(target, Tensor):
            raise InputError(f"the target is a {type(target).__name__}; give a tensor as the loss takes it, or None")
        if self.loss is not None and not callable(self.loss):
            raise InputError(f"the loss is a {type(self.loss).__name__}; give a function of output and target, or None")
        names, values, state = self._inputs(tensors, target)
        outputs: list[str] = []

        def step(*arguments: Tensor) -> list[Tensor]:
            results = self._step(dict(zip(names, arguments, strict=True)), target is not None)
            outputs[:] = results
            return list(results.values())

        try:
            graph = make_fx(step, dict(IN_PLACE), tracing_mode="fake", _allow_non_fake_inputs=True)(*values)
        except E2PassError:
            raise
        except Exception as error:
            raise ExportError(
                f"the training step cannot be traced: {first_line(error)}; a loss or module that looks at values must "
                "be rewritten"
            ) from error
        return TracedStep(graph, names, outputs, state)

    def _inputs(
        self, tensors: Sequence[Tensor], target: Tensor | None
    ) -> tuple[list[str], list[Tensor], dict[str, Tensor]]:
        state = state_tensors(self.twin, self.update)
        own = [LOSS, *([TARGET] if target is not None else [])]
        self._check_names(state, own)
        self.arguments = input_names(self.plan.inputs, [*state, *own])
        batch = dict(zip(self.arguments, tensors, strict=True))
        if target is not None:
            batch[TARGET] = target
        named = batch | state
        return list(named), list(named.values()), state

    def _check_names(self, state: Mapping[str, Tensor], own: Sequence[str]) -> None:
        """Refuse a tensor of the model that has a name which the step needs for another."""
        for prefix in (NEXT, GRADIENT) if self.gradients else (NEXT,):
            own = [*own, *(prefix + name for name in state)]
        taken = next((name for name in own if name in state), None)
        if taken is not None:
            raise ExportError(
                f"the model has a tensor named {taken}, a name that the exported step has for another; rename the "
                "module or parameter"
            )

    def prepare(self, tensors: Sequence[Tensor]) -> None:
        """Run once for real, so that each region is lowered: inside a trace it could not be."""
        state = {k: v.clone() for k, v in self._tensors().items()}
        self._forward(tensors, self._prepare_body)
        with torch.no_grad():
            for name, tensor in self._tensors().items():
                tensor.copy_(state[name])

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self.twin.named_parameters()), **dict(self.twin.named_buffers())}

    def _step(self, given: Mapping[str, Tensor], has_target: bool) -> dict[str, Tensor]:
        parameters = {n: given[n] for n, _ in self.twin.named_parameters()}
        trained = {n: given[n].detach().requires_grad_() for n in self.update.state}
        buffers = {n: given[n].clone() for n, _ in self.twin.named_buffers()}
        if self.twin.e2_slu is not None:
            object.__setattr__(self.twin.e2_slu, "_standardise", functools.partial(_standardise, self.twin.e2_slu))
        with _Swapped(self.twin, {**parameters, **trained, **buffers}):
            self.entered: dict[str, Tensor] = {}
            output = self._forward([given[n] for n in self.arguments], self._opaque_body)
            loss = self._loss(output, given[TARGET] if has_target else None)
            gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
            results = {LOSS: loss.detach()}
            with torch.no_grad():
                results |= self._updated(given, dict(zip(trained, gradients, strict=True)))
        if self.gradients:
            results |= {GRADIENT + n: g for n, g in zip(trained, gradients, strict=True) if g is not None}
        return results | buffers

    def _updated(self, given: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        results: dict[str, Tensor] = {}
        conditions = self._conditions()
        for group in self.update.groups:
            lr = given[f"lr.{group.name}"]
            for name in group.parameters:
                gradient = gradients[name]
                if gradient is None:
                    continue
                held = {key: given[f"{name}.{key}"] for key in self.update.state[name]}
                new, states = group.rule(given[name], gradient, held, lr, group.options)
                for key, value in {name: new, **{f"{name}.{k}": v for k, v in states.items()}}.items():
                    condition = conditions.get(name)
                    results[key] = value if condition is None else torch.where(condition, value, given[key])
        return results

    def _conditions(self) -> dict[str, Tensor]:
        """For each parameter that only gated bodies use, whether one of them was entered: else nothing changes it."""
        users: dict[str, list[str]] = {}
        for region in self.plan.regions:
            for name in region_parameters(region, self.twin):
                users.setdefault(self.canonical[name], []).append(region.name)
        gated = {name: tuple(r) for name, r in users.items() if all(region in self.entered for region in r)}
        any_of = {r: torch.stack([self.entered[region] for region in r]).any() for r in set(gated.values())}
        return {name: any_of[r] for name, r in gated.items()}

    def _forward(self, tensors: Sequence[Tensor], run_body: Callable[..., Tensor]) -> Any:
        twin, slu = self.twin, self.twin.e2_slu
        twin.e2_counts = SelectionCounts()
        values: dict[str, Any] = dict(zip(self.plan.inputs, tensors, strict=True))
        overrides = twin._shared_weights()
        if slu is not None:
            slu.begin()
        for step in self.plan.steps:
            if isinstance(step, RunRegion):
                inputs = [values[n] for n in step.region.inputs]
                results = self._trunk(step.region, inputs, overrides)
                values.update(zip(step.region.outputs, results, strict=True))
            elif isinstance(step, Decide):
                assert slu is not None
                previous = values[step.previous] if step.previous is not None else None
                values[step.out] = slu(step.index, values[step.fork], previous)
            else:
                inputs = [values[n] for n in step.body.inputs]
                values[step.out] = run_body(step, inputs, values[step.shortcut], values[step.gate], overrides)
        if slu is not None:
            slu.settle()
        if twin.e2_steps is not None:
            twin.e2_steps.count += 1
        return twin.returned(values)

    def _trunk(self, region: Region, inputs: list[Tensor], overrides: dict[str, tuple[Tensor, Tensor]]) -> Any:
        scales: Any = self.twin.e2_scales.update if self.twin.e2_scales is not None else _ignore
        return self.runners[region.name](inputs, _batch(region, inputs), 1.0, overrides, _ignore, scales)

    def _prepare_body(
        self, step: Skip, inputs: list[Tensor], shortcut: Tensor, gate: Any, overrides: dict[str, tuple[Tensor, Tensor]]
    ) -> Tensor:
        region, runner = step.body, self.runners[step.body.name]
        batch = _batch(region, inputs)
        if region.needs_two:
            raise ExportError(
                f"region {region.name} normalises by the batch without spatial extent, and a batch of one open sample "
                "has no variance; replace its batch norm, or leave that block ungated"
            )
        if runner.cache is None:
            runner = RegionRunner(region, self.twin, LoweringCache(()))
        compiled = runner.prepared(inputs, batch)
        if compiled is None:
            raise ExportError(f"region {region.name} could not be lowered, see the diagnostics of transform")
        self.bodies[region.name] = Body(region, compiled)
        tensors = runner.arguments(compiled, inputs, overrides)
        values, _ = compiled(tensors, [overrides[name][1] for _, name in compiled.shadows], _ignore)
        return merge_masked(shortcut, values, gate)

    def _opaque_body(
        self, step: Skip, inputs: list[Tensor], shortcut: Tensor, gate: Any, overrides: dict[str, tuple[Tensor, Tensor]]
    ) -> Tensor:
        body = self.bodies[step.body.name]
        mask = gate[0]
        tensors = self.runners[step.body.name].arguments(body.compiled, inputs, overrides)
        shadows = [overrides[name][1] for _, name in body.compiled.shadows]
        results = RunBody.apply(body, mask.detach(), len(tensors), *tensors, *shadows)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            self.entered[step.body.name] = (mask > 0).any()
            self._keep_side_results(body, mask, results)
        for result, ((kind, _), _) in zip(results, body.outputs(), strict=True):
            if kind == "output":
                shortcut = MergeWhole.apply(shortcut, result, mask)  # type: ignore[no-untyped-call]
        return shortcut

    def _keep_side_results(self, body: Body, mask: Tensor, results: Sequence[Tensor]) -> None:
        """New running statistics count by the share of samples that entered; where none did nothing changes."""
        entered = self.entered[body.region.name]
        share = mask.mean()
        scales = []
        for ((kind, name), _), value in zip(body.outputs(), results, strict=True):
            if kind == "scale":
                scales.append(value)
            elif kind == "mutation":
                buffer = self.twin.get_buffer(name)
                averages = self.runners[body.region.name].averages(name)
                new = torch.lerp(buffer, value, share.to(value.dtype)) if averages else value
                buffer.copy_(torch.where(entered, new, buffer))
        if scales:
            assert self.twin.e2_scales is not None
            held = self.twin.e2_scales.get_buffer(body.region.name)
            before = held.clone()
            self.twin.e2_scales.update(body.region.name, body.compiled.joint.scales, scales)
            held.copy_(torch.where(entered, held, before))

    def place_of(self, operator: str) -> str:
        """Where a region calls an ATen operator first, in words; ``""`` if none does."""
        for region in self.plan.regions:
            compiled = self.bodies[region.name].compiled if region.name in self.bodies else None
            try:
                joint = compiled.joint if compiled is not None else self.runners[region.name].lower(region.specs, 2)
            except LoweringError:
                continue
            for node in joint.graph.nodes:
                if node.op == "call_function" and str(node.target) == operator:
                    path = region.paths.get(node.meta.get("e2_from", ""), "")
                    return f"region {region.name}" + (f" (module {path})" if path else "")
        return ""

    def _loss(self, output: Any, target: Tensor | None) -> Tensor:
        leaves = [v for v in pytree.tree_leaves(opened(output)) if isinstance(v, Tensor) and v.is_floating_point()]
        if not leaves:
            raise InputError("the model returns no floating-point tensor, so there is nothing to train on")
        if target is None:
            if leaves[0].dim():
                raise InputError("give a target: the model does not return its loss")
            return leaves[0]
        try:
            found = _cross_entropy(leaves[0], target) if self.loss is None else self.loss(output, target)
        except GuardOnDataDependentSymNode as error:
            raise ExportError(
                "the loss looks at values of its tensors, and the exported step would do what it did for these; write "
                "it with torch.where"
            ) from error
        except Exception as error:
            raise InputError(
                f"{'cross-entropy' if self.loss is None else 'the loss'} takes no output of shape "
                f"{list(leaves[0].shape)} with a target of shape {list(target.shape)} and type {target.dtype}: "
                f"{first_line(error)}"
            ) from error
        check_loss(found)
        return found.reshape(()) if found.dim() else found


def _cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    if labels.dtype == torch.bool:  # a tracer takes them for numbers, which PyTorch does not
        raise ValueError("labels are class indices (int64) or probabilities")
    if scores.dim() == 3:  # (B, T, classes): the classes come last
        scores, labels = scores.flatten(0, 1), labels.flatten()
    return nn.functional.cross_entropy(scores, labels)


class _Swapped:
    """Puts tensors in place of a module's parameters and buffers, aliases included, and takes them out again."""

    def __init__(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        self.slots: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []
        by_id: dict[int, Tensor] = {}
        for name, old in [*module.named_parameters(), *module.named_buffers()]:
            by_id[id(old)] = tensors[name]
        for owner in module.modules():
            for registry in (owner._parameters, owner._buffers):
                for key, old_value in registry.items():
                    if old_value is not None:
                        self.slots.append((registry, key, old_value, by_id[id(old_value)]))

    def __enter__(self) -> None:
        for slots, key, _, new in self.slots:
            slots[key] = new

    def __exit__(self, *exception: object) -> None:
        for slots, key, old, _ in self.slots:
            slots[key] = old


def _batch(region: Region, inputs: Sequence[Tensor]) -> int:
    for tensor, k in zip(inputs, region.rows, strict=True):
        if k:
            return tensor.shape[0] // k
    return 1


def _check_gates(slu: SLUGates) -> None:
    if slu.kind == "random":
        raise ExportError(
            "random gates draw from PyTorch's generator, which ONNX has not; export with set_gates('learned')"
        )
    if slu.min_active:
        raise ExportError(
            f"gates that keep min_active={slu.min_active} samples count what is open, which a graph cannot; "
            "transform with min_active=0"
        )


def _standardise(slu: SLUGates, gate: Gate, logit: Tensor, current: Any) -> Tensor:
    """As ``SLUGates``, with the step's number as a tensor: the graph holds for the first step and for all others."""
    del current
    mean, var = gate.logit_mean.view(1).clone(), gate.logit_var.view(1).clone()
    if len(logit) > 1:
        batch_mean, batch_var = torch.zeros_like(mean), torch.ones_like(var)
        out = nn.functional.batch_norm(logit, batch_mean, batch_var, training=True, momentum=1.0, eps=slu.EPS)
        with torch.no_grad():
            momentum = torch.where(slu.steps > 0, slu.MOMENTUM, 1.0)
            keep_finite(gate, torch.lerp(mean, batch_mean, momentum), torch.lerp(var, batch_var, momentum))
        return out
    with torch.no_grad():
        momentum = (1.0 / (slu.steps + 2)).clamp(min=slu.MOMENTUM_OF_ONE)
        away = (logit - mean).view(1)
        var = (var + momentum * away.square()) * (1.0 - momentum)
        mean = mean + momentum * away
    keep_finite(gate, mean, var)
    return nn.functional.batch_norm(logit, mean, var, eps=slu.EPS)


def _plain_runners(twin: E2Module) -> dict[str, RegionRunner]:
    """What runs the regions of training; a tracer cannot look into compiled code."""
    runners = twin._runners["train"]
    cache = twin._executable.cache
    if cache is None or not cache.compile:
        return runners
    plain = LoweringCache(cache.rewrites, cache.failed)
    return {name: RegionRunner(runner.region, twin, plain) for name, runner in runners.items()}


def _ignore(*_: Any) -> None:
    """Nobody keeps scales or counts."""
