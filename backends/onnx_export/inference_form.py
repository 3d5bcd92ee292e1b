"""The transformed model as torch.export can trace it: evaluation mode, flat tensors in and out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from e2pass.backends.onnx_export.opaque import Body
from e2pass.capture.output import opened
from e2pass.errors import ExportError, LoweringError
from e2pass.plan import Decide, Plan, Region, RunRegion, Skip
from e2pass.runtime.merge import merge_masked
from e2pass.runtime.module import E2Module
from e2pass.runtime.region import CompiledRegion
from e2pass.runtime.runner import LoweringCache, RegionRunner


class InferenceForm:
    """Executes the evaluation plan of a copy of a transformed model without a look at any value.

    The lowered form of each region is chosen beforehand (``prepare``): lowering inside a trace is not possible.

    Attributes:
        twin: The copy.
        masked: Whether every block is computed, and multiplied by its gate's decision.
        compiled: The lowered form of each region, None where it runs as it is.
        bodies: The regions that are skipped.
    """

    def __init__(self, module: E2Module, masked: bool) -> None:
        self.twin = copy.deepcopy(module).eval()
        self.masked = masked
        self.compiled: dict[str, CompiledRegion | None] = {}
        self.bodies: dict[str, Body] = {}
        self._own_runners: dict[str, RegionRunner] = {}
        self._preparing = False
        if self.twin.e2_slu is not None:
            # Counting decisions would become an output of the exported graph.
            object.__setattr__(self.twin.e2_slu, "_record", _nothing)

    def root(self) -> nn.Module:
        """A module whose ``forward`` is ``run``, and whose parameters and buffers have their names in the model."""
        return _Root(self.twin, self.run)

    @property
    def plan(self) -> Plan:
        """What is executed."""
        return self.twin._executable.plans["eval"]

    def prepare(self, tensors: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
        """Run once, lowering what is executed lowered; returns the outputs with a name each."""
        self._preparing = True
        try:
            with torch.no_grad():
                output = self._execute(tensors)
        finally:
            self._preparing = False
        leaves = pytree.tree_flatten_with_path(opened(output))[0]
        return [(_identifier(path), leaf) for path, leaf in leaves if isinstance(leaf, Tensor)]

    def run(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run on one tensor per input of the plan; returns the tensors in the model's output."""
        return tuple(leaf for leaf in pytree.tree_leaves(opened(self._execute(tensors))) if isinstance(leaf, Tensor))

    def _execute(self, tensors: Sequence[Tensor]) -> Any:
        plan, slu = self.plan, self.twin.e2_slu
        values: dict[str, Any] = dict(zip(plan.inputs, tensors, strict=True))
        for step in plan.steps:
            if isinstance(step, RunRegion):
                results = self._region(step.region, [values[n] for n in step.region.inputs])
                values.update(zip(step.region.outputs, results, strict=True))
            elif isinstance(step, Decide):
                assert slu is not None
                previous = values[step.previous] if step.previous is not None else None
                values[step.out] = slu(step.index, values[step.fork], previous)
            elif isinstance(step, Skip):
                assert slu is not None
                inputs = [values[n] for n in step.body.inputs]
                gate, shortcut = values[step.gate], values[step.shortcut]
                if self.masked or self._preparing:
                    values[step.out] = merge_masked(
                        shortcut, self._region(step.body, inputs), gate, slu.factor(step.index)
                    )
                else:
                    factor = slu.factor(step.index)
                    for arm in self._skipping(step.body, inputs, gate[0]):
                        shortcut = shortcut + (arm * factor if factor != 1.0 else arm)
                    values[step.out] = shortcut
        return self.twin.returned(values)

    def runner(self, name: str) -> RegionRunner:
        """What runs a region: bodies that are skipped are lowered even where nothing else asks for it."""
        own = self.twin._runners["eval"][name]
        if self.masked or own.cache is not None or own.region.block is None:
            return own
        return self._own_runners.setdefault(name, RegionRunner(own.region, self.twin, LoweringCache(())))

    def _region(self, region: Region, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        runner = self.runner(region.name)
        if self._preparing:
            self._prepare(region, runner, inputs)
        compiled = self.compiled[region.name]
        if compiled is None:
            results: Sequence[Tensor] = runner.eager(*inputs)
            return results
        values = compiled.halves.inference(*runner.arguments(compiled, inputs))
        return [v for v, (kind, _) in zip(values, compiled.halves.forward_outputs, strict=True) if kind == "output"]

    def _prepare(self, region: Region, runner: RegionRunner, inputs: Sequence[Tensor]) -> None:
        compiled = self.compiled[region.name] = runner.prepared(inputs, _batch(region, inputs))
        if compiled is not None and any(kind == "mutation" for kind, _ in compiled.side_keys):
            raise ExportError(
                f"region {region.name} writes to a buffer in evaluation mode, which an inference graph cannot hold; "
                "make the model leave its buffers alone in eval()"
            )
        if region.block is not None and not self.masked:
            if compiled is None:
                raise ExportError(
                    f"region {region.name} could not be lowered, so it cannot be a branch of its own; "
                    "export with masked=True"
                )
            self.bodies[region.name] = Body(region, compiled, training=False)

    def _skipping(self, region: Region, inputs: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
        body = self.bodies[region.name]
        arguments = self.runner(region.name).arguments(body.compiled, inputs)
        results = torch.ops.e2pass.body(arguments, mask, region.name)
        return [r for r, ((kind, _), _) in zip(results, body.outputs(), strict=True) if kind == "output"]

    def place_of(self, operator: str) -> str:
        """Where a region calls an ATen operator first, in words; ``""`` if none does."""
        for region in self.plan.regions:
            for node in self._lowered_nodes(region):
                if node.op == "call_function" and str(node.target) == operator:
                    path = region.paths.get(node.meta.get("e2_from", ""), "")
                    return f"region {region.name}" + (f" (module {path})" if path else "")
        return ""

    def _lowered_nodes(self, region: Region) -> Iterable[fx.Node]:
        """Lowered nodes remember which of the model's they came from; what runs as it is, is lowered to ask."""
        compiled = self.compiled.get(region.name)
        if compiled is not None:
            return compiled.halves.inference.graph.nodes
        try:
            return self.runner(region.name).lower(region.specs, 2).graph.nodes
        except LoweringError:
            return ()


class _Root(nn.Module):
    """Shares the registries of a model, so that no name of its own can stand in the way of a child's."""

    def __init__(self, twin: nn.Module, run: Callable[..., tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.training = False
        for registry in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[registry] = twin.__dict__[registry]
        object.__setattr__(self, "forward", run)


def _batch(region: Region, inputs: Sequence[Tensor]) -> int:
    for tensor, k in zip(inputs, region.rows, strict=True):
        if k:
            return tensor.shape[0] // k
    return 1


def _nothing(*_: Any) -> None:
    """Nobody counts decisions."""


def _identifier(path: tuple[Any, ...]) -> str:
    name = "_".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)
    return name or "output"
