"""The public calls: choose the passes for a configuration, run them, and put the result together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from e2pass.backends.fpga.model import FpgaCostModel
from e2pass.backends.graph import GraphWriters
from e2pass.capture import capture
from e2pass.capture.copies import copied
from e2pass.compiler import require_compiler
from e2pass.config import PSG, SLU, SMD, Bits, Config, resolve
from e2pass.cost import CostModel
from e2pass.diagnostics import Diagnostics, Severity
from e2pass.errors import ConfigError, InputError, StrictError
from e2pass.inputs import Inputs
from e2pass.passes.base import Pass
from e2pass.passes.drop_batches import DropBatches
from e2pass.passes.find_residual_blocks import FindResidualBlocks
from e2pass.passes.insert_gates import InsertGates
from e2pass.passes.lower import Lower
from e2pass.passes.manager import OnPass, PassManager
from e2pass.passes.outline import Outline
from e2pass.passes.predict_signs import PredictSigns
from e2pass.passes.price import Price, WeighGates
from e2pass.passes.quantize import Quantize
from e2pass.passes.registry import parse
from e2pass.program import Program
from e2pass.report import CostReport
from e2pass.runtime.module import E2Module, Executable
from e2pass.runtime.runner import LoweringCache
from e2pass.runtime.scales import RunningScales
from e2pass.runtime.steps import StepCounter
from e2pass.step.rates import STANDARD, PredictorHardware
from e2pass.step.training_step import TrainingStep
from e2pass.transformed import Transformed

Loss = Callable[..., torch.Tensor]


def transform(
    model: nn.Module,
    example_inputs: Any,
    loader: Any = None,
    *,
    config: Config | str = "e2train",
    board: Any = "zedboard",
    loss: Loss | None = None,
    optimizer: str | torch.optim.Optimizer | None = None,
    strict: bool = False,
    inplace: bool = False,
) -> Transformed:
    """Rewrite a model, its backward pass and its loader so that training costs a fraction of the energy.

    Args:
        model: Any ``nn.Module``; it is not changed unless ``inplace``.
        example_inputs: A tensor, a tuple of positional arguments or a dict of keyword arguments, batch first.
        loader: A ``DataLoader`` or any iterable of batches; SMD wraps it. None leaves SMD out.
        config: An ``e2pass.Config`` or the name of a preset.
        board: Name of a shipped board, path of a board file, or a cost model: it prices the blocks for the gates and
            the reports.
        loss: ``loss(output, target)`` for the price of the loss; default cross-entropy on the first output.
        optimizer: For the price of the update: a ``torch.optim`` optimizer or a key of
            ``e2pass.step.training_step.OPTIMIZERS`` such as ``"adamw"``; default SGD with momentum.
        strict: Raise instead of leaving a part of the model as it is.
        inplace: Let the result share the caller's parameters instead of a copy's.

    Raises:
        InputError: For a model or inputs that do not fit each other.
        ConfigError: For an unknown preset, key or optimizer.
        BoardError: For an unknown or malformed board.
        LoaderError: For a loader that SMD cannot work on.
        CaptureError: If no graph of the model can be captured.
        StrictError: With ``strict``, naming everything that could not be transformed.
    """
    settings = resolve(config)
    if loss is not None and not callable(loss):
        raise ConfigError(
            f"loss is a {type(loss).__name__}; give a function of output and target that returns one number"
        )
    if settings.compile:
        require_compiler()
    cost_model = _cost_model(board)
    program = _program(model, example_inputs, settings, inplace)
    program.loader = loader
    step = TrainingStep(cost_model, loss=loss, optimizer=optimizer)
    PassManager(pipeline(settings, step)).run(program)
    if strict:
        _refuse_gaps(program)
    module = assemble(program)
    return Transformed(module, program, step, GraphWriters())


def analyze(
    model: nn.Module,
    example_inputs: Any,
    *,
    board: Any = "zedboard",
    config: Config | str | None = None,
    hardware: PredictorHardware = STANDARD,
) -> CostReport:
    """Price one training step of a model, and with a configuration that of its transformed form beside it.

    Args:
        model: Any ``nn.Module``; it is not changed.
        example_inputs: As for ``transform``; their batch size is the one that is priced.
        board: As for ``transform``.
        config: What to transform with; None leaves ``.transformed`` None.
        hardware: What the board does with predicted weight gradients; matters with PSG only.

    Raises:
        InputError, ConfigError, BoardError, CaptureError: As ``transform``.
    """
    if config is None:
        program = _program(model, example_inputs, resolve("neutral").model_copy(update={"slu": None}), inplace=False)
        step = TrainingStep(_cost_model(board))
        PassManager([FindResidualBlocks(), Outline(), Lower(), Price(step)]).run(program)
        return step.report(program, baseline_only=True)
    settings = resolve(config)
    loader = [None, None] if settings.smd is not None else None
    return transform(model, example_inputs, loader, config=settings, board=board).report(hardware=hardware)


def run_passes(
    model: nn.Module, example_inputs: Any, passes: str, *, board: Any = "zedboard", on_pass: OnPass | None = None
) -> Program:
    """Run a pipeline given as text, such as ``find-residual-blocks,insert-gates{hidden=10},outline,lower``.

    Args:
        model: Any ``nn.Module``; it is not changed.
        example_inputs: As for ``transform``.
        passes: Names and options of the passes, in order; what is not among them does not happen.
        board: As for ``transform``; for the passes that price.
        on_pass: Called after each pass with the pass, its result and the seconds it took.

    Raises:
        ConfigError: For text that is no pipeline.
        PassError: For a pass whose requirements no earlier one establishes.
    """
    step = TrainingStep(_cost_model(board))
    chosen = parse(passes, step=step)
    program = _program(model, example_inputs, _config_of(chosen), inplace=False)
    if program.config.smd is not None:
        program.loader = [None, None]
    return PassManager(chosen, on_pass).run(program)


def _config_of(passes: Sequence[Pass]) -> Config:
    """The configuration that a pipeline amounts to."""
    sections = {
        InsertGates: ("slu", SLU),
        Quantize: ("bits", Bits),
        PredictSigns: ("psg", PSG),
        DropBatches: ("smd", SMD),
    }
    found: dict[str, Any] = {"smd": None, "slu": None, "psg": None, "bits": None}
    for item in passes:
        if type(item) in sections:
            key, section = sections[type(item)]
            found[key] = section(**dataclasses.asdict(item))
    if found["bits"] is None:
        found["psg"] = None  # the pass itself will say that it needs operands
    return Config(**found)


def pipeline(config: Config, step: TrainingStep | None = None) -> list[Pass]:
    """The passes that a configuration asks for, in order; without ``step`` those that price are left out."""
    passes: list[Pass] = []
    if config.slu is None:
        passes.append(FindResidualBlocks())
    else:
        passes.append(FindResidualBlocks(include=config.slu.include, exclude=config.slu.exclude))
        passes.append(InsertGates(**config.slu.model_dump(exclude={"include", "exclude"})))
    passes += [Outline(), Lower()]
    if config.slu is not None and step is not None:
        passes.append(WeighGates(step))
    if config.bits is not None:
        passes.append(Quantize(**config.bits.model_dump()))
    if config.psg is not None:
        passes.append(PredictSigns(**config.psg.model_dump()))
    if config.smd is not None:
        passes.append(DropBatches(**config.smd.model_dump()))
    return [*passes, *([Price(step)] if step is not None else [])]


def _cost_model(board: Any) -> CostModel:
    return board if hasattr(board, "cost") else FpgaCostModel(board)


def _program(model: nn.Module, example_inputs: Any, config: Config, inplace: bool) -> Program:
    if not isinstance(model, nn.Module):
        raise InputError(f"the model is a {type(model).__name__}; an instance of torch.nn.Module is needed")
    if isinstance(model, E2Module):
        raise InputError("the model is transformed already; transform t.unwrap() instead")
    inputs = Inputs.of(example_inputs)
    owner = model if inplace else _copied(model)
    diagnostics = Diagnostics()
    program = Program.of(owner, inputs, config, capture(owner, inputs, diagnostics))
    program.diagnostics = diagnostics
    return program


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copied(model)
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} cannot be copied ({error}); pass inplace=True to transform the model itself"
        ) from error


def _refuse_gaps(program: Program) -> None:
    gaps = list(program.diagnostics.at_least(Severity.WARNING))
    if gaps:
        raise StrictError("strict=True, and not everything could be transformed: " + "; ".join(map(str, gaps)))


def assemble(program: Program) -> E2Module:
    """The module that executes a program; at the least blocks must have been found and regions outlined."""
    config = program.config
    opaque = {r.name for r in program.plans["train"].regions} - program.lowered.keys()
    cache = LoweringCache(program.rewrites, opaque, compile=config.compile) if config.bits is not None else None
    executable = Executable(
        capture=program.capture,
        plans=program.plans,
        cache=cache,
        shared=program.shared,
        config=config,
        recipe=restore,
        arguments=(_small(program), config),
    )
    scales = None
    if config.bits is not None:
        scales = RunningScales({name: joint.scales for name, (_, joint) in program.lowered.items() if joint.scales})
    return E2Module(program.model, executable, program.slu, scales, _step_counter(config))


def _step_counter(config: Config) -> StepCounter | None:
    warmup = config.psg.warmup if config.psg is not None else 0
    stochastic = config.bits is not None and config.bits.rounding == "stochastic"
    return StepCounter(warmup) if warmup or stochastic else None


def _small(program: Program) -> Inputs:
    """Example inputs to pickle: two samples do where the batch size is a symbol."""
    return program.inputs.with_batch(2) if program.capture.symbolic_batch else program.inputs


def restore(source: nn.Module, inputs: Inputs, config: Config) -> E2Module:
    """Transform an unpickled original again: pickles hold models and configurations, not graphs."""
    program = _program(source, inputs, config, inplace=True)
    PassManager(pipeline(config)).run(program)
    return assemble(program)
