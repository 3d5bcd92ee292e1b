"""The transformed model: an ``nn.Module`` over the original's parameters that executes a plan."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from e2pass.capture import Capture
from e2pass.capture.copies import copied
from e2pass.capture.origin import first_sentence
from e2pass.config import Config
from e2pass.errors import E2PassError, InputError
from e2pass.plan import Decide, Mode, Plan, Region, RunRegion, Skip, ValueName
from e2pass.runtime.decision import processes_wait
from e2pass.runtime.gates import SLUGates
from e2pass.runtime.merge import merge_gathered, merge_masked
from e2pass.runtime.runner import LoweringCache, RegionRunner, bind_module, fetch
from e2pass.runtime.scales import RunningScales
from e2pass.runtime.shared import SumThenSign
from e2pass.runtime.steps import StepCounter
from e2pass.runtime.undo import Slot, slots, undone_on_failure


class Executable:
    """Everything immutable about a transformed model; copies of the model share it.

    Attributes:
        capture: Binds calls to graph inputs and rebuilds outputs.
        plans: Execution order in each mode.
        cache: Compiled regions; None where nothing is executed lowered.
        shared: Weights whose gradients are summed over regions before they are signed: alias to owner's first name.
        config: What was applied.
        recipe: Transforms the original module again, ``recipe(source, *arguments) -> E2Module``: what pickle stores
            in place of graphs.
        arguments: The recipe's further arguments.
    """

    def __init__(
        self,
        capture: Capture,
        plans: dict[Mode, Plan],
        cache: LoweringCache | None,
        shared: dict[str, str],
        config: Config,
        recipe: Callable[..., E2Module],
        arguments: tuple[Any, ...],
    ) -> None:
        self.capture, self.plans, self.cache = capture, plans, cache
        self.shared, self.config = shared, config
        self.recipe, self.arguments = recipe, arguments

    def __deepcopy__(self, memo: dict[int, Any]) -> Executable:
        return self


class E2Module(nn.Module):
    """A model that trains for less: called, trained and saved like the original.

    Parameters, buffers and submodules are the original's, under their original names; what the transformation adds
    lives in the children ``e2_slu`` (gates), ``e2_scales`` (quantizers' running scales), ``e2_counts`` and, where
    something depends on the number of the step, ``e2_steps``.
    """

    def __init__(
        self,
        source: nn.Module,
        executable: Executable,
        slu: SLUGates | None,
        scales: RunningScales | None,
        steps: StepCounter | None = None,
    ) -> None:
        super().__init__()
        self._adopt(source)
        self.training = source.training
        self._executable = executable
        self.e2_slu = slu
        self.e2_scales = scales
        self.e2_counts = SelectionCounts()
        self.e2_steps = steps
        for name, constant in executable.capture.constants.items():
            self.register_buffer(name, constant, persistent=False)
        self._bind()

    def _adopt(self, source: nn.Module) -> None:
        """Take the original's registries as they are: names, order and aliases stay, and so does all sharing."""
        object.__setattr__(self, "_source", source)
        for registry in ("_modules", "_parameters", "_buffers"):
            self.__dict__[registry] = dict(source.__dict__[registry])
        self.__dict__["_non_persistent_buffers_set"] = set(source._non_persistent_buffers_set)

    def _bind(self) -> None:
        runners: dict[Mode, dict[str, RegionRunner]] = {}
        for mode, plan in self._executable.plans.items():
            cache = self._executable.cache
            runners[mode] = {r.name: RegionRunner(r, self, cache) for r in plan.regions}
        self._runners = runners
        self._beside = {mode: bind_module(p.beside.graph, self) for mode, p in self._executable.plans.items()}
        statistics = {name for runner in runners["train"].values() for name in runner.statistics}
        norms = [m for m in self.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
        moved: list[Slot] = [slot for norm in norms for slot in slots(norm)]
        for name in statistics:
            parent, _, leaf = name.rpartition(".")
            moved.append((self.get_submodule(parent)._buffers, leaf))
        self._statistics = list({(id(registry), leaf): (registry, leaf) for registry, leaf in moved}.values())

    def _moved(self) -> list[Slot]:
        """Buffers that a call in training changes before it is over."""
        if not self.training:
            return []
        return [*self._statistics, *slots(self.e2_slu), *slots(self.e2_scales)]

    def source(self) -> nn.Module:
        """The original module, whose parameters, buffers and mode these are."""
        source: nn.Module = self._source  # type: ignore[assignment]
        for registry in ("_modules", "_parameters", "_buffers"):
            source.__dict__[registry].update(
                {k: self.__dict__[registry][k] for k in source.__dict__[registry]}
            )  # what a caller assigned at the top level since
        source.training = self.training
        return source

    def train(self, mode: bool = True) -> E2Module:
        """Set the mode as the original's class does it: one that keeps frozen norms in evaluation goes on doing so."""
        source = self.source()
        if getattr(source.train, "__func__", None) is nn.Module.train:
            super().train(mode)
            return self
        source.train(mode)
        self.training = source.training
        for registry in ("_modules", "_parameters", "_buffers"):
            self.__dict__[registry].update(source.__dict__[registry])  # what it assigned
        for name, module in self._modules.items():
            if name not in source._modules and module is not None:
                module.train(mode)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; arguments and result are the original's."""
        return self.execute(args, kwargs, masked=False)

    def execute(self, args: Sequence[Any], kwargs: dict[str, Any], *, masked: bool) -> Any:
        """Run the plan of the present mode, skipping blocks for real or (``masked``) multiplying them by zero.

        After an exception the statistics, scales and gates are as they were before the call.
        """
        executable = self._executable
        self._refuse_recomputation()
        if torch._C._functorch.maybe_current_level() is not None:
            raise E2PassError(
                "a transformed model cannot run inside torch.vmap or torch.func.grad; use t.unwrap() there"
            )
        bound = executable.capture.bind(args, kwargs)
        values: dict[str, Any] = dict(zip(self._plan.inputs, bound, strict=True))
        batch = next((t.shape[0] for t in bound if t.dim()), 1)
        precise = self._warming() or self._autocasts(bound)
        with undone_on_failure(self._moved(), self.e2_slu), _explained(executable.capture, bound):
            self._walk(_Run(self, values, batch, masked, precise))
        if self.e2_slu is not None:
            self.e2_slu.settle()
        if self.e2_steps is not None and self.training and torch.is_grad_enabled():
            self.e2_steps.count += 1
        return self.returned(values)

    def returned(self, values: Mapping[str, Any]) -> Any:
        """What the model returns in the present mode, once ``values`` are computed."""
        plan = self._plan
        found = self._beside["train" if self.training else "eval"](*(values[n] for n in plan.beside.inputs))
        known = {**values, **dict(zip(plan.beside.outputs, found, strict=True))}
        output = tree_map(lambda v: known[v.name] if isinstance(v, ValueName) else v, plan.output)
        return self._executable.capture.rebuild(output, self.training)

    def _walk(self, run: _Run) -> None:
        if self.e2_slu is not None:
            self.e2_slu.begin()
        for step in self._plan.steps:
            run.step(step)
            for name in step.release:
                run.values.pop(name, None)

    def _refuse_recomputation(self) -> None:
        stateful = self.e2_slu is not None or self.e2_steps is not None
        if stateful and self.training and torch._C._current_graph_task_id() != -1:
            raise E2PassError(
                "a transformed model in training cannot run within a backward pass, as torch.utils.checkpoint does: "
                "its gates would decide and be counted twice; call it without checkpoint, or transform with slu=None, "
                "rounding='nearest' and warmup=0"
            )

    @property
    def _plan(self) -> Plan:
        return self._executable.plans["train" if self.training else "eval"]

    def _shared_weights(self) -> dict[str, tuple[Tensor, Tensor]]:
        psg = self._executable.config.psg
        if psg is None or not self.training or not torch.is_grad_enabled():
            return {}
        made: dict[str, tuple[Tensor, Tensor]] = {}
        for name in set(self._executable.shared.values()):
            weight = fetch(self, name)  # an exported step swaps tensors in for the parameters
            if weight.requires_grad:
                made[name] = SumThenSign.apply(weight, name, psg, self.e2_counts.add)  # type: ignore[no-untyped-call]
        return {alias: made[name] for alias, name in self._executable.shared.items() if name in made}

    def _autocasts(self, inputs: Sequence[Tensor]) -> bool:
        """Whether autocast chooses the types of products, so that codes and signs can not; a warning says so."""
        if self._executable.cache is None or not any(torch.is_autocast_enabled(t.device.type) for t in inputs):
            return False
        warnings.warn(
            "torch.autocast chooses the types of products, so low precision and predicted signs are off within it; "
            "call the transformed model outside of it",
            stacklevel=2,
        )
        return True

    def _warming(self) -> bool:
        return self.e2_steps is not None and self.e2_steps.warming

    def __deepcopy__(self, memo: dict[int, Any]) -> E2Module:
        twin = E2Module.__new__(E2Module)
        memo[id(self)] = twin
        for key, value in self.__dict__.items():
            twin.__dict__[key] = copy.copy(value) if isinstance(value, dict) else value
        object.__setattr__(twin, "_source", copied(self.source(), memo))
        for registry in ("_modules", "_parameters", "_buffers"):
            twin.__dict__[registry] = {k: copy.deepcopy(v, memo) for k, v in self.__dict__[registry].items()}
        twin._bind()
        return twin

    def neutral_copy(self) -> E2Module:
        """A copy that runs every block in full precision: what must equal the original."""
        twin = copy.deepcopy(self)
        executable = self._executable
        twin._executable = Executable(
            executable.capture,
            executable.plans,
            None,
            {},
            executable.config.model_copy(update={"psg": None, "bits": None}),
            executable.recipe,
            executable.arguments,
        )
        if twin.e2_slu is not None:
            twin.e2_slu.kind = "open"
        twin._bind()
        return twin

    def __reduce__(self) -> Any:
        executable = self._executable
        own = {k: v for k, v in self._modules.items() if k.startswith("e2_")}
        return executable.recipe, (self.source(), *executable.arguments), own

    def __setstate__(self, own: dict[str, Any]) -> None:
        self._modules.update(own)


@contextmanager
def _explained(capture: Capture, values: Sequence[Tensor]) -> Iterator[None]:
    """Say of an error which input is unlike the example, if one is: torch names an operation somewhere inside."""
    try:
        yield
    except E2PassError:
        raise
    except Exception as error:
        misfit = capture.misfit(values)
        if not misfit:
            raise
        raise InputError(f"{misfit}, and does not run on it: {first_sentence(error)}") from error


class SelectionCounts(nn.Module):
    """What PSG's statistics measured of each weight, summed over steps.

    Attributes:
        counts: For each weight a float64 vector: elements predicted, predicted with the right sign, all, and the sum
            of the bound on the probability of a wrong sign over the predicted ones.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, Tensor] = {}

    def add(self, name: str, counts: Tensor) -> None:
        """Add the counts of one step; called in backward."""
        held = self.counts.get(name)
        self.counts[name] = counts.detach().clone() if held is None else held.add_(counts.detach())

    def get_extra_state(self) -> dict[str, Tensor]:
        """Part of the state dict."""
        return dict(self.counts)

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        """Restore from the state dict."""
        self.counts = {k: v.clone() for k, v in state.items()}


class _Run:
    """One forward pass."""

    def __init__(self, module: E2Module, values: dict[str, Any], batch: int, masked: bool, precise: bool) -> None:
        self.module, self.values, self.batch, self.masked, self.precise = module, values, batch, masked, precise
        self.overrides = {} if precise else module._shared_weights()
        self.runners = module._runners["train" if module.training else "eval"]

    def step(self, step: RunRegion | Decide | Skip) -> None:
        values = self.values
        if isinstance(step, RunRegion):
            inputs = [values[n] for n in step.region.inputs]
            results = self._region(step.region, inputs, None)
            values.update(zip(step.region.outputs, results, strict=True))
        elif isinstance(step, Decide):
            previous = values[step.previous] if step.previous is not None else None
            slu = self.module.e2_slu
            assert slu is not None
            values[step.out] = slu(step.index, values[step.fork], previous)
        else:
            values[step.out] = self._skip(step)

    def _region(self, region: Region, inputs: list[Tensor], whole: int | None) -> tuple[Tensor, ...]:
        batch = _batch(region, inputs, self.batch)
        share = 1.0 if whole is None else batch / whole
        module = self.module
        on_scales: Callable[..., None] = module.e2_scales.update if module.e2_scales is not None else _ignore
        runner = self.runners[region.name]
        return runner(inputs, batch, share, self.overrides, module.e2_counts.add, on_scales, precise=self.precise)

    def _skip(self, step: Skip) -> Tensor:
        values, slu = self.values, self.module.e2_slu
        assert slu is not None
        inputs = [values[n] for n in step.body.inputs]
        shortcut: Tensor = values[step.shortcut]
        gate = values[step.gate]
        factor = slu.factor(step.index)
        if self.masked:
            return merge_masked(shortcut, self._region(step.body, inputs, None), gate, factor)
        mask: Tensor = gate[0]
        index = None if slu.kind == "open" else mask.detach().nonzero().squeeze(1)
        if index is None or len(index) == len(mask):
            for arm in self._region(step.body, inputs, None):
                shortcut = merge_gathered(shortcut, arm * factor if factor != 1.0 else arm, mask, None)
            return shortcut
        if len(index) == 0:
            return merge_gathered(shortcut, None, mask, None, self._untouched(step.body))
        chosen = [_rows(t, index, k) for t, k in zip(inputs, step.body.rows, strict=True)]
        for arm in self._region(step.body, chosen, len(mask)):
            shortcut = merge_gathered(shortcut, arm, mask, index)
        return shortcut

    def _untouched(self, body: Region) -> list[Tensor]:
        """The parameters of a body that nobody entered, where processes wait for a gradient of each of them."""
        if not processes_wait():
            return []
        parameters = (registry[leaf] for registry, leaf in self.runners[body.name].parameters)
        return [p for p in parameters if p.requires_grad]


def _ignore(*_: Any) -> None:
    """Nobody keeps scales."""


def _batch(region: Region, inputs: Sequence[Tensor], whole: int) -> int:
    """How many samples there are in what flows into a region: all where nothing grows with their number."""
    for tensor, k in zip(inputs, region.rows, strict=True):
        if k:
            return tensor.shape[0] // k
    return whole


def _rows(tensor: Tensor, index: Tensor, per_sample: int) -> Tensor:
    """The rows of the chosen samples; all of them where the tensor does not grow with the batch."""
    if per_sample == 0:
        return tensor
    if per_sample == 1:
        return tensor.index_select(0, index)
    rows = tensor.reshape(-1, per_sample, *tensor.shape[1:]).index_select(0, index)
    return rows.reshape(-1, *tensor.shape[1:])
