"""The capture ladder: the most structured graph that can be had of a model, and the reason it is not a better one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from e2pass.capture import exported, symbolic
from e2pass.capture.binding import Binding
from e2pass.capture.copies import copied
from e2pass.capture.dice import INSTEAD_OF_CHANCE, by_chance, dice_of, difference_at_any_throw
from e2pass.capture.functional import differs_by_mode, functionalize
from e2pass.capture.norms import unify_batch_norms
from e2pass.capture.origin import explain
from e2pass.capture.rung import Draft, RungError, graft
from e2pass.capture.shapes import Observed, ShapeWorld, make_world, observe
from e2pass.capture.state import model_kept, modes_kept, quiet, rng_kept
from e2pass.capture.verify import Run, difference, run, run_model
from e2pass.diagnostics import Diagnostics
from e2pass.errors import CaptureError, InputError
from e2pass.inputs import Inputs

_PROOF_BATCH = 3
_MODES = ("training", "evaluation")


@dataclass
class Capture:
    """Flat forward graphs of a model, over the model's own modules, parameters and buffers.

    Attributes:
        train: Graph in training mode.
        eval: Graph in evaluation mode; the same object where the two do not differ.
        rung: ``symbolic_trace``, ``export`` or ``symbolic_trace+leaves``.
        constants: Tensors that belong to no module, by the name under which the graphs fetch them.
        fake_mode: The mode of the fake tensors in ``node.meta["val"]``.
        symbolic_batch: Whether the batch size in them is a symbol.
        leaves: Modules of the user that were not traced into.
    """

    train: fx.GraphModule
    eval: fx.GraphModule
    rung: str
    constants: dict[str, torch.Tensor]
    fake_mode: FakeTensorMode
    symbolic_batch: bool
    leaves: tuple[str, ...]
    _binding: Binding
    _rebuild: tuple[Callable[[Any], Any], Callable[[Any], Any]]

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
        """Return one tensor per placeholder of the graphs.

        Raises:
            InputError: If the call does not fit the one that was captured.
        """
        return self._binding.bind(args, kwargs)

    def misfit(self, values: Sequence[torch.Tensor]) -> str:
        """Say in which input a call that failed differs from the example; ``""`` if in none."""
        return self._binding.misfit(values)

    def rebuild(self, output: Any, training: bool | None = None) -> Any:
        """Turn what a graph returned into what the model returns.

        Args:
            output: Value of the graph's output node.
            training: Which graph it came from; None for the mode that ``train`` is in.
        """
        training = self.train.training if training is None else training
        return self._rebuild[0 if training else 1](output)


def capture(model: nn.Module, inputs: Inputs, diagnostics: Diagnostics) -> Capture:
    """Capture ``model`` as it is called with ``inputs``.

    Args:
        model: Any module; it is not changed.
        inputs: An example call with at least one sample.
        diagnostics: Receives which rung of the ladder was used, and why not a better one.

    Returns:
        Graphs whose outputs and buffer updates are bit-equal to the model's in both modes.

    Raises:
        InputError: If ``model`` is no module, or does not run on ``inputs``.
        CaptureError: If no rung works; the message names the offending line.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"the model is a {type(model).__name__}; an instance of torch.nn.Module is needed")
    if any(torch.nn.parameter.is_lazy(t) for t in [*model.parameters(), *model.buffers()]):
        raise InputError(f"{type(model).__name__} has lazy parameters without shapes; call it once before")
    with torch.inference_mode(False), torch.enable_grad(), rng_kept(), model_kept(model):
        return _Ladder(model, inputs, diagnostics).climb()


class _Ladder:
    """The state of one capture."""

    def __init__(self, model: nn.Module, inputs: Inputs, diagnostics: Diagnostics) -> None:
        self._model = model
        self._work = _copy(model)
        self._diagnostics = diagnostics
        self._binding = Binding(model, inputs)
        self._inputs = inputs
        self._proof, self._expected = self._run_original()
        self._refuse_changed_buffers()
        dice = [dice_of(self._work, self._call, training) for training in (True, False)]
        self._outcomes = (dice[0].outcomes, dice[1].outcomes)
        self._chance = dice[0].line or dice[1].line

    def climb(self) -> Capture:
        """Try one rung after the other."""
        reasons: list[str] = []
        narrow: tuple[Capture, Diagnostics] | None = None
        for name, make in self._rungs():
            try:
                with model_kept(self._work):
                    draft = make()
                result, remarks = self._finish(draft)
            except (RungError, CaptureError) as error:
                reasons.append(f"{name}: {error}")
                continue
            refused = self._refused_batches(draft, remarks)
            if refused:  # a rung below may hold for every batch
                reasons.append(f"{name}: the graph does not hold for other batch sizes such as {refused[0]}")
                narrow = result, remarks
                continue
            self._report(result, remarks, reasons)
            return result
        if narrow is not None:
            self._report(*narrow, [reason for reason in reasons if not reason.startswith(narrow[0].rung + ":")])
            return narrow[0]
        if self._chance:
            raise CaptureError(f"{type(self._model).__name__} {by_chance(self._chance)}; {INSTEAD_OF_CHANCE}")
        found = [reason.partition(": ")[2] for reason in reasons]
        known = [why for why in (_odd_batch(self._inputs), _cumulative_norm(self._model)) if why]
        *others, last = [*found, *known]
        failure = CaptureError(f"{type(self._model).__name__} cannot be captured: {last}")
        for other in others:
            failure.add_note(f"tried before: {other}")
        raise failure

    def _rungs(self) -> Iterable[tuple[str, Callable[[], Draft]]]:
        if not self._chance:
            yield "symbolic_trace", lambda: symbolic.draft(self._work, self._binding, self._outcomes)
            yield "export", self._export
        yield "symbolic_trace+leaves", lambda: symbolic.draft_with_leaves(self._work, self._binding, self._outcomes)

    def _export(self) -> Draft:
        inputs = self._inputs.with_batch(max(2, self._inputs.batch_size))
        tensors = self._binding.bind(*_fresh(inputs))
        batched = [inputs.is_batched(t) for t in tensors]
        return exported.draft(self._work, self._binding, tensors, batched, self._outcomes)

    def _refused_batches(self, draft: Draft, remarks: Diagnostics) -> list[int]:
        """Batch sizes near the example's that the graph does not hold for; farther ones are only remarked on."""
        allows, batch = draft.allows_batch, self._inputs.batch_size
        if allows is None:
            return []
        near = {size for size in (batch - 1, batch + 1, 2 * batch) if size > 1}
        refused = sorted(size for size in {2, max(2, batch // 2)} | near if not allows(size))
        if refused:
            sizes = ", ".join(map(str, refused))
            remarks.warn("E2P111", "", f"the graph does not hold for batch sizes such as {sizes}")
        return [size for size in refused if size in near]

    def _run_original(self) -> tuple[Inputs, tuple[Run, Run]]:
        """Run the model in both modes on a small batch, or on the whole example where a small one does not do."""
        batch = self._inputs.batch_size
        sizes = [max(2, min(batch, _PROOF_BATCH)), batch] if batch != _PROOF_BATCH else [batch]
        for size in sizes:
            inputs = self._inputs.with_batch(size)
            try:
                return inputs, (self._run(inputs, True), self._run(inputs, False))
            except Exception as error:
                failure = error
        raise InputError(
            f"{type(self._model).__name__} does not run on the example inputs: {explain(failure)}"
        ) from failure

    def _run(self, inputs: Inputs, training: bool) -> Run:
        tensors = self._binding.bind(*_fresh(inputs))
        return run_model(self._work, self._binding.call_with(tensors), training)

    def _refuse_changed_buffers(self) -> None:
        """Refuse a model that removes a buffer or replaces it by one of another kind: a graph only writes into it."""
        for name, buffer in self._work.named_buffers():
            for expected in self._expected:
                after = expected.buffers.get(name)
                if after is None or after.shape != buffer.shape or after.dtype != buffer.dtype:
                    kinds = [f"{t.dtype} {tuple(t.shape)}" if t is not None else "nothing" for t in (buffer, after)]
                    raise CaptureError(
                        f"{type(self._model).__name__} turns its buffer {name} from {kinds[0]} into {kinds[1]} in one "
                        "call, which a graph cannot; keep its shape and type"
                    )

    def _call(self) -> Any:
        bound = self._binding.call_with(self._binding.bind(*_fresh(self._proof)))
        return self._work(*bound.args, **bound.kwargs)

    def _finish(self, draft: Draft) -> tuple[Capture, Diagnostics]:
        """Give a draft its modules and shapes, and prove it."""
        remarks = Diagnostics()
        graphs = _split_modes(draft.graphs, self._work)
        shells = [graft(self._work, graph, draft.constants) for graph in graphs]
        world = self._annotate(shells, draft.leaves, remarks)
        for shell, training in zip(shells, (True, False), strict=False):
            functionalize(shell.graph, self._work, training, world, remarks)
            unify_batch_norms(shell.graph)
            shell.graph.lint()
            shell.recompile()
        for mode, shell in enumerate((shells[0], shells[-1])):
            problem = difference(self._expected[mode], self._run_graph(shell, draft, self._proof, mode == 0))
            if problem:
                raise RungError(f"the graph is not equal to the model in {_MODES[mode]} mode: {problem}")
            if self._chance:
                self._prove_throws(shell, draft, mode == 0)
        final = [graft(self._model, shell.graph, draft.constants) for shell in shells]
        result = Capture(
            train=final[0],
            eval=final[-1],
            rung=draft.rung,
            constants=draft.constants,
            fake_mode=world.mode,
            symbolic_batch=world.symbolic and world.batch_is_symbolic,
            leaves=draft.leaves,
            _binding=self._restricted(draft, shells[-1]),
            _rebuild=draft.rebuild,
        )
        return result, remarks

    def _prove_throws(self, shell: fx.GraphModule, draft: Draft, training: bool) -> None:
        """Modules that stay opaque go on throwing their dice; those thrown elsewhere are in the graph for ever."""

        def graph() -> Any:
            return draft.rebuild[0 if training else 1](shell(*self._binding.bind(*_fresh(self._proof))))

        if difference_at_any_throw(self._work, self._call, graph, training):
            raise RungError("the graph does not throw the model's dice")

    def _run_graph(self, shell: fx.GraphModule, draft: Draft, inputs: Inputs, training: bool) -> Run:
        rebuild = draft.rebuild[0 if training else 1]
        tensors = self._binding.bind(*_fresh(inputs))
        try:
            return run(self._work, lambda: rebuild(shell(*tensors)), training)
        except Exception as error:
            raise RungError(f"the graph does not run: {explain(error)}") from error

    def _restricted(self, draft: Draft, shell: fx.GraphModule) -> Binding:
        """Return a binding that refuses the calls that the graph does not hold for."""
        allows = draft.allows_batch
        if draft.sizes is None or allows is None:
            return self._binding
        one = self._equal_for_one(draft, shell)
        binding = copy.copy(self._binding)
        binding.fix_sizes(draft.sizes)
        binding.restrict_batch(lambda batch: one if batch == 1 else allows(batch))
        return binding

    def _equal_for_one(self, draft: Draft, shell: fx.GraphModule) -> bool:
        """Whether an exported graph also holds for one sample, which no symbol stands for."""
        inputs = self._inputs.with_batch(1)
        try:
            expected = self._run(inputs, False)
        except Exception:  # the model cannot do it either; its own error will be the clearer one
            return True
        try:
            return not difference(expected, self._run_graph(shell, draft, inputs, False))
        except RungError:
            return False

    def _annotate(self, shells: Sequence[fx.GraphModule], leaves: Sequence[str], remarks: Diagnostics) -> ShapeWorld:
        """Derive shapes with a symbolic batch, or with the example's where that is refused."""
        failure: RungError | None = None
        seen = [self._observe(shell, leaves, training) for shell, training in zip(shells, (True, False), strict=False)]
        for symbolic_batch in (True, False):
            inputs = self._inputs.with_batch(max(2, self._inputs.batch_size))
            world = make_world(inputs, self._binding.bind(*_fresh(inputs)), symbolic_batch)
            try:
                for shell, opaque, training in zip(shells, seen, (True, False), strict=False):
                    with model_kept(self._work), quiet():
                        self._work.train(training)
                        world.annotate(shell, self._work, opaque)
            except RungError as error:
                failure = error
                continue
            if symbolic_batch and not world.batch_is_symbolic:
                failure = RungError("the model compares it with a number")
                continue
            if not symbolic_batch:
                remarks.warn("E2P110", "", f"the batch size is fixed at {inputs.batch_size} in all shapes: {failure}")
            return world
        raise failure or RungError("shapes cannot be derived")

    def _observe(self, shell: fx.GraphModule, leaves: Sequence[str], training: bool) -> Observed:
        """Run opaque modules for real, in two batch sizes: fake tensors cannot take data-dependent branches."""
        if not leaves:
            return {}
        batch = max(2, self._inputs.batch_size)
        calls = [(size, self._binding.bind(*_fresh(self._inputs.with_batch(size)))) for size in (batch, batch + 1)]
        try:
            with rng_kept(), model_kept(self._work):
                self._work.train(training)
                return observe(shell, leaves, calls)
        except Exception as error:
            raise RungError(explain(error)) from error

    def _report(self, result: Capture, remarks: Diagnostics, reasons: Sequence[str]) -> None:
        self._diagnostics.info("E2P100", "", f"captured by {result.rung}")
        for reason in reasons:
            self._diagnostics.info("E2P101", "", f"not captured by {reason}")
        still = self._in_evaluation() if result.rung == "export" else []
        if still:
            message = f"{_and_more(still)} in evaluation, but an exported graph trains in all modules or in none"
            self._diagnostics.warn("E2P103", still[0], message)
        moved = self._expected[0].moved_in_backward
        if moved:
            message = (
                f"{_and_more(moved)} updated in the backward pass too, where a checkpoint runs again what the graph "
            )
            self._diagnostics.warn("E2P105", moved[0], message + "runs once")
        hooked = _hooked(self._model, result)
        if hooked:
            whose = "its" if len(hooked) == 1 else f"like {len(hooked) - 1} more, its"
            message = (
                f"{whose} forward hooks ran for the capture alone: what they return is part of the graph, what else "
            )
            self._diagnostics.warn("E2P106", hooked[0], message + "they do is not")
        if self._chance:
            message = f"{by_chance(self._chance)}, so the modules around it stay opaque and go on throwing"
            self._diagnostics.warn("E2P104", "", message, INSTEAD_OF_CHANCE)
        for leaf in result.leaves:
            self._diagnostics.warn("E2P102", leaf, "could not be traced and stays one opaque operation")
        self._diagnostics.extend(dict.fromkeys(remarks))

    def _in_evaluation(self) -> list[str]:
        """Norms and dropouts in evaluation within a model in training, other than those that its ``train()`` leaves."""
        kinds = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)
        with modes_kept(self._work):
            self._work.train(self._model.training)
            exported = {name for name, module in self._work.named_modules() if module.training}
        modules = self._model.named_modules()
        return [n for n, m in modules if isinstance(m, kinds) and not m.training and n in exported]


def _odd_batch(inputs: Inputs) -> str:
    """A first tensor of one row among others of more, which may not be where the batch is; empty if there is none."""
    first, *others = inputs.tensors()
    longer = [t for t in others if t.dim() and t.shape[0] > 1]
    if inputs.batch_size != 1 or not longer:
        return ""
    return (
        f"the batch is dimension 0 of the first tensor of the example inputs, of shape {tuple(first.shape)}, so one "
        f"sample, while another has shape {tuple(longer[0].shape)}; give a dict that begins with a tensor of the batch"
    )


def _cumulative_norm(model: nn.Module) -> str:
    """A norm whose momentum is one over the number of its calls, which no graph can hold; empty if there is none."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is None:
            return f"norm {name} has momentum=None, an average over all calls; give it a number such as 0.1"
    return ""


def _and_more(names: Sequence[str]) -> str:
    """The verb for the first of ``names`` and all others."""
    return "is" if len(names) == 1 else f"and {len(names) - 1} more are"


def _hooked(model: nn.Module, result: Capture) -> list[str]:
    """Modules whose forward hooks ran for capturing alone: those that no node of the graphs calls."""
    called = {node.target for graph in (result.train, result.eval) for node in graph.graph.find_nodes(op="call_module")}
    inner = [(name, m) for name, m in model.named_modules() if name not in called]
    hidden = [name for name, _ in inner if not any(name.startswith(f"{leaf}.") for leaf in called)]
    hooks = {name: bool(m._forward_hooks or m._forward_pre_hooks) for name, m in inner}
    return [name for name in hidden if hooks[name]]


def _split_modes(graphs: tuple[fx.Graph, fx.Graph], model: nn.Module) -> list[fx.Graph]:
    """Return one graph where both modes share it and may go on doing so, else one per mode."""
    train, evaluated = graphs
    if train is not evaluated:
        return [train, evaluated]
    if not differs_by_mode(train, model):
        return [train]
    copied = fx.Graph()
    copied.output(copied.graph_copy(train, {}))
    return [train, copied]


def _fresh(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copy a call: a model may write into its inputs."""
    copied = inputs.with_batch(inputs.batch_size)
    return copied.args, copied.kwargs


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copied(model)
    except Exception as error:
        raise InputError(f"{type(model).__name__} cannot be copied: {explain(error)}") from error
