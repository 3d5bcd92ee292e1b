"""Writing the gated model in evaluation mode as one ONNX file."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import torch
from torch import Tensor, fx

from e2pass.backends.onnx_export.inference_form import InferenceForm
from e2pass.backends.onnx_export.translation import TABLE
from e2pass.capture.rung import same_graph
from e2pass.errors import ExportError, InputError
from e2pass.inputs import Inputs
from e2pass.runtime.module import E2Module
from e2pass.runtime.region import CompiledRegion
from e2pass.runtime.runner import RegionRunner

if TYPE_CHECKING:
    from e2pass.transformed import Transformed

OPSET = 18
PROBES = (1, 2, 3, 7, 16, 64, 1024)
"""Batch sizes at which a lowered region must be the same graph before the batch is exported as dynamic."""
LARGEST = 2**31 - 2**20
"""Bytes of weights that fit in one protobuf file beside the graph."""


def export_inference(
    t_or_module: Transformed | E2Module, example_inputs: Any, path: str | Path, *, dynamic_batch: bool = True
) -> Path:
    """Write the gated model in evaluation mode to an ONNX file that any runtime can execute.

    The file holds the masked form: every block is computed and multiplied by its gate's decision, so its outputs equal
    those of the model, which skips closed blocks. Weights keep the names of the state dict (``e2_slu.*``: the gates),
    quantized layers compute on their integer codes' values with the frozen running scales. The module given is not
    changed.

    Args:
        t_or_module: What ``e2pass.transform`` returned, or its ``.model``.
        example_inputs: As for ``e2pass.transform``.
        path: File to write; an existing one is replaced, and only by a complete file.
        dynamic_batch: Leave the batch size open. Where capture could not, it is that of the example inputs anyway.

    Returns:
        ``path``.

    Raises:
        InputError: If the arguments are of the wrong kind or do not fit the model.
        ExportError: If the model has no ONNX form; the message names operator, place and what to do.
    """
    module = transformed_module(t_or_module)
    path = _target(path)
    form = InferenceForm(module)
    capture = module._executable.capture
    dynamic = dynamic_batch and capture.symbolic_batch
    inputs = Inputs.of(example_inputs)
    if dynamic:
        inputs = inputs.with_batch(max(2, inputs.batch_size))  # torch.export takes a size of 1 for a constant
    tensors = tuple(t.detach() for t in capture.bind(inputs.args, inputs.kwargs))
    _check_size(form)
    names = _output_names([name for name, _ in form.prepare(tensors)], form.plan.inputs)
    if dynamic:
        _check_every_batch(form)
    shapes = tuple(_dynamic_dims(node, dynamic) for node in capture.eval.graph.find_nodes(op="placeholder"))
    with _quiet(), torch.no_grad():
        program = _trace(form, tensors, shapes)
        onnx_program = _translate(form, program, names, shapes)
    _write(onnx_program, path)
    return path


def transformed_module(t_or_module: Any) -> E2Module:
    """The transformed model in ``t_or_module``.

    Raises:
        InputError: If it is something else.
    """
    module = t_or_module if isinstance(t_or_module, E2Module) else getattr(t_or_module, "model", None)
    if not isinstance(module, E2Module):
        raise InputError(
            f"a {type(t_or_module).__name__} cannot be exported; give what e2pass.transform returned, or its .model"
        )
    return module


def _target(path: str | Path) -> Path:
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of the file to write")
    if not path.parent.is_dir():
        raise InputError(f"the folder {path.parent} does not exist; create it first")
    return path


def _check_size(form: InferenceForm) -> None:
    total = sum(t.numel() * t.element_size() for t in form.state_dict().values() if isinstance(t, Tensor))
    if total > LARGEST:
        raise ExportError(
            f"the model holds {total / 2**30:.1f} GiB of weights, and one ONNX file at most 2; convert it to half "
            "precision, or export parts of it"
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


def _check_every_batch(form: InferenceForm) -> None:
    """A lowered graph is valid under guards; what other batch sizes lower to must be the same computation."""
    for name, runner in form.twin._runners["eval"].items():
        used = form.compiled.get(name)
        if used is None:
            continue
        for batch in PROBES:
            if used.joint.accepts(batch):
                continue
            other = _compiled_at(runner, batch)
            if other is None or not same_graph(other.halves.inference.graph, used.halves.inference.graph):
                raise ExportError(
                    f"region {name} is another computation for a batch of {batch} than for one of "
                    f"{used.joint.batch}; export with dynamic_batch=False, one file for each batch size"
                )


def _compiled_at(runner: RegionRunner, batch: int) -> CompiledRegion | None:
    specs = runner.region.specs
    with torch.no_grad():
        return runner.prepared([torch.zeros((), dtype=s.dtype).expand(s.concrete(batch)) for s in specs], batch)


def _trace(form: InferenceForm, tensors: tuple[Tensor, ...], shapes: tuple[Any, ...]) -> torch.export.ExportedProgram:
    try:
        return torch.export.export(form, tensors, dynamic_shapes=(shapes,), strict=False)
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(
            f"torch.export cannot trace the model in evaluation mode: {_first_line(error)}; a module that looks at "
            "values or at the batch size must be rewritten, or export with dynamic_batch=False"
        ) from error


def _translate(
    form: InferenceForm, program: torch.export.ExportedProgram, outputs: list[str], shapes: Sequence[Any]
) -> Any:
    axes = tuple({i: "batch" for i, d in (dims or {}).items() if isinstance(d, torch.export.Dim)} for dims in shapes)
    try:
        return torch.onnx.export(
            program,
            (),
            None,
            input_names=list(form.plan.inputs),
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
        raise ExportError(_untranslated(form, error)) from error


def _untranslated(form: InferenceForm, error: BaseException) -> str:
    """Name the operator that has no translation and the place it came from."""
    chain: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        chain.append(str(cause))
        cause = cause.__cause__
    failed = re.search(r"%(\w+) : .*?\[target=torch\.ops\.([\w.]+)\]", "\n".join(chain))
    if failed is None:
        return f"torch.onnx cannot translate the model: {_first_line(error)}; replace the operator it names"
    place = form.place_of(failed[2]) or f"the model (node {failed[1]})"
    return (
        f"operator {failed[2]} in {place} has no ONNX form; replace it by operators that have one, or keep that part "
        "out of the exported model"
    )


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[0].strip().rstrip(".") if lines else type(error).__name__


def _output_names(names: Sequence[str], taken: Sequence[str]) -> list[str]:
    made: list[str] = []
    for name in names:
        plain = name = re.sub(r"\W+", "_", name) if not name.isdigit() else f"output_{name}"
        suffix = 1
        while name in made or name in taken:
            name, suffix = f"{plain}_out{suffix}", suffix + 1
        made.append(name)
    return made


def _write(onnx_program: Any, path: Path) -> None:
    """Check the model in a file of its own, then move it into place."""
    for graph in onnx_program.model.graphs():
        graph.metadata_props.clear()  # the exporter's records of its own run have no place in the file
        for node in graph:
            node.metadata_props.clear()
            for value in (*node.inputs, *node.outputs):
                if value is not None:
                    value.metadata_props.clear()
        for value in (*graph.inputs, *graph.outputs):
            value.metadata_props.clear()
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    try:
        with _quiet():
            onnx_program.save(temporary, external_data=False)
        onnx.checker.check_model(temporary, full_check=True)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except OSError:
        raise
    except Exception as error:
        raise ExportError(
            f"the ONNX file of the model is not valid: {_first_line(error)}; please report it with the model"
        ) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter: what matters is raised."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
