"""Writing the gated model in evaluation mode as one ONNX file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from e2pass.backends.onnx_export.aten import decomposed, quiet, untranslated
from e2pass.backends.onnx_export.branches import expand_bodies
from e2pass.backends.onnx_export.files import (
    check_size,
    checkpoint_into,
    first_line,
    input_names,
    target_path,
    transformed_module,
    write_model,
)
from e2pass.backends.onnx_export.functions import OPSET
from e2pass.backends.onnx_export.inference_form import InferenceForm
from e2pass.backends.onnx_export.opaque import traced
from e2pass.backends.onnx_export.qdq import to_qdq
from e2pass.backends.onnx_export.translation import TABLE
from e2pass.capture.rung import same_graph
from e2pass.errors import ExportError
from e2pass.inputs import Inputs
from e2pass.runtime.module import E2Module
from e2pass.runtime.region import CompiledRegion
from e2pass.runtime.runner import RegionRunner

if TYPE_CHECKING:
    from e2pass.transformed import Transformed

PROBES = (1, 2, 3, 7, 16, 64, 1024)
"""Batch sizes at which a lowered region must be the same graph before the batch is exported as dynamic."""


def export_inference(
    t_or_module: Transformed | E2Module,
    example_inputs: Any,
    path: str | Path,
    *,
    masked: bool = False,
    dynamic_batch: bool = True,
    checkpoint: Mapping[str, Any] | str | Path | None = None,
) -> Path:
    """Write the gated model in evaluation mode to an ONNX file that any runtime can execute.

    The body of each gated block is the branch of an ``If``. With more than one sample it runs on those whose gate is
    open (``NonZero``, ``Gather``, ``ScatterND``), and where there is none nothing of it runs. Weights keep the names of
    the state dict (``e2_slu.*``: the gates). Quantized layers hold their weights as integer codes, ``NAME.codes`` and
    ``NAME.scale``, behind ``DequantizeLinear``, and activations pass through ``QuantizeLinear`` with the frozen
    running scales. The module given is not changed.

    Args:
        t_or_module: What ``e2pass.transform`` returned, or its ``.model``.
        example_inputs: As for ``e2pass.transform``.
        path: File to write; an existing one is replaced, and only by a complete file.
        masked: Compute every block and multiply it by its gate's decision: for tools without ``If`` or ``NonZero``.
        dynamic_batch: Leave the batch size open. Where capture could not, it is that of the example inputs anyway.
        checkpoint: What ``t.state_dict()`` or ``t.model.state_dict()`` returned, or a file that ``torch.save`` wrote
            of it, in place of the model's present state.

    Returns:
        ``path``.

    Raises:
        InputError: If the arguments are of the wrong kind or do not fit the model.
        ExportError: If the model has no ONNX form; the message names operator, place and what to do.
    """
    module = checkpoint_into(transformed_module(t_or_module), checkpoint)
    path = target_path(path)
    _refuse_wide_scales(module)
    form = InferenceForm(module, masked)
    capture = module._executable.capture
    dynamic = dynamic_batch and capture.symbolic_batch
    inputs = Inputs.of(example_inputs)
    if dynamic:
        inputs = inputs.with_batch(max(2, inputs.batch_size))  # torch.export takes a size of 1 for a constant
    tensors = tuple(t.detach() for t in capture.bind(inputs.args, inputs.kwargs))
    stored = [name for name, _ in [*form.twin.named_parameters(), *form.twin.named_buffers()]]
    given = input_names(form.plan.inputs, stored)
    names = _output_names([name for name, _ in form.prepare(tensors)], [*given, *stored])
    _check_batches(form, dynamic, inputs.batch_size)
    shapes = tuple(_dynamic_dims(node, dynamic) for node in capture.eval.graph.find_nodes(op="placeholder"))
    with quiet(), torch.no_grad(), traced(form.bodies):
        program = _trace(form, tensors, shapes)
        model = _translate(form, program, given, names, shapes).model
        expand_bodies(model, form.place_of)
        to_qdq(model)
        check_size(model)
        write_model(model, path)
    return path


def _refuse_wide_scales(module: E2Module) -> None:
    """ONNX's quantization operators take scales in float32 only."""
    wide = next((name for name, p in module.named_parameters() if p.dtype == torch.float64), None)
    if module.e2_scales is not None and wide is not None:
        raise ExportError(
            f"{wide} is in double precision, for which ONNX has no codes; convert the model to float first"
        )


def _dynamic_dims(placeholder: fx.Node, dynamic: bool) -> dict[int, Any] | None:
    if not dynamic:
        return None
    shape = placeholder.meta["val"].shape
    open_dims = {i: d for i, d in enumerate(shape) if isinstance(d, torch.SymInt)}
    return {
        i: torch.export.Dim("batch", min=1) if d.node.expr.is_Symbol else torch.export.Dim.AUTO
        for i, d in open_dims.items()
    } or None


def _check_batches(form: InferenceForm, dynamic: bool, batch: int) -> None:
    """A lowered graph is valid under guards; what other batch sizes lower to must be the same computation."""
    for name, used in form.compiled.items():
        if used is None:
            continue
        probes = PROBES if dynamic else [n for n in PROBES if n <= batch] if name in form.bodies else []
        for probe in probes:
            if used.joint.accepts(probe):
                continue
            other = _compiled_at(form.runner(name), probe)
            if other is None or not same_graph(other.halves.inference.graph, used.halves.inference.graph):
                raise ExportError(
                    f"region {name} is another computation for a batch of {probe} than for one of "
                    f"{used.joint.batch}; export with dynamic_batch=False, one file for each batch size, or masked=True"
                )


def _compiled_at(runner: RegionRunner, batch: int) -> CompiledRegion | None:
    specs = runner.region.specs
    with torch.no_grad():
        return runner.prepared([torch.zeros((), dtype=s.dtype).expand(s.concrete(batch)) for s in specs], batch)


def _trace(form: InferenceForm, tensors: tuple[Tensor, ...], shapes: tuple[Any, ...]) -> torch.export.ExportedProgram:
    try:
        return torch.export.export(form.root(), tensors, dynamic_shapes=(shapes,), strict=False)
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(
            f"torch.export cannot trace the model in evaluation mode: {first_line(error)}; a module that looks at "
            "values or at the batch size must be rewritten, or export with dynamic_batch=False"
        ) from error


def _translate(
    form: InferenceForm,
    program: torch.export.ExportedProgram,
    inputs: list[str],
    outputs: list[str],
    shapes: Sequence[Any],
) -> Any:
    axes = tuple({i: "batch" for i, d in (dims or {}).items() if isinstance(d, torch.export.Dim)} for dims in shapes)
    try:
        return torch.onnx.export(
            decomposed(program),
            (),
            None,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=axes if any(axes) else None,  # the trace has its own: this names the axes
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            optimize=False,  # it would fold quantized weights into nameless constants
            verbose=False,
            custom_translation_table=TABLE,
        )
    except Exception as error:
        raise ExportError(untranslated(error, form.place_of)) from error


def _output_names(names: Sequence[str], taken: Sequence[str]) -> list[str]:
    made: list[str] = []
    for name in names:
        plain = name = re.sub(r"\W+", "_", name) if not name.isdigit() else f"output_{name}"
        suffix = 1
        while name in made or name in taken:
            name, suffix = f"{plain}_out{suffix}", suffix + 1
        made.append(name)
    return made
