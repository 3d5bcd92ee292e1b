"""What all exports share: which model, which file, and writing it whole or not at all."""

from __future__ import annotations

import contextlib
import copy
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import torch

from e2pass.backends.onnx_export.functions import OPSET, add_functions
from e2pass.errors import ExportError, InputError
from e2pass.runtime.mismatch import mismatch
from e2pass.runtime.module import E2Module

LARGEST = 2**31 - 2**20
"""Bytes of weights that fit in one protobuf file beside the graph."""


def transformed_module(t_or_module: Any) -> E2Module:
    """The transformed model in ``t_or_module``.

    Raises:
        InputError: If it is something else.
        ExportError: If it is in a type that cannot be written.
    """
    module = t_or_module if isinstance(t_or_module, E2Module) else getattr(t_or_module, "model", None)
    if not isinstance(module, E2Module):
        raise InputError(
            f"a {type(t_or_module).__name__} cannot be exported; give what e2pass.transform returned, or its .model"
        )
    check_types(module)
    return module


def check_types(module: E2Module) -> None:
    """Refuse a model in a type that numpy, and so the file's writer, has not."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    odd = next((name for name, tensor in tensors if tensor.dtype == torch.bfloat16), None)
    if odd is not None:
        raise ExportError(f"{odd} is in bfloat16, which cannot be exported; convert the model to float or half first")


def target_path(path: str | Path) -> Path:
    """``path``, after a look whether a file can be written there."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of the file to write")
    if not path.parent.is_dir():
        raise InputError(f"the folder {path.parent} does not exist; create it first")
    return path


def checkpoint_into(module: E2Module, checkpoint: Mapping[str, Any] | str | Path | None) -> E2Module:
    """A copy of the module with a checkpoint loaded; without one the module itself.

    Raises:
        InputError: If the checkpoint is no state dict, or that of another model.
    """
    if checkpoint is None:
        return module
    if isinstance(checkpoint, str | Path):
        if not Path(checkpoint).is_file():
            raise InputError(f"there is no checkpoint {checkpoint}")
        try:
            checkpoint = torch.load(checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:
            # The loader's own words are about how to trust a file that runs code.
            raise InputError(f"{checkpoint} is no state dict that torch.save wrote ({type(error).__name__})") from error
    if not isinstance(checkpoint, Mapping):
        raise InputError(f"a checkpoint is what state_dict() returned, not a {type(checkpoint).__name__}")
    state = checkpoint.get("model", checkpoint)
    if not isinstance(state, Mapping):
        raise InputError(f"the checkpoint's 'model' is a {type(state).__name__}, not what state_dict() returned")
    twin = copy.deepcopy(module)
    try:
        twin.load_state_dict(state)
    except Exception as error:
        raise InputError(f"the checkpoint is not one of this model: {mismatch(twin, state) or error}") from None
    return twin


def input_names(wanted: Sequence[str], taken: Iterable[str]) -> list[str]:
    """Names of the batch's inputs: those of the arguments, with ``_in`` behind one that is taken."""
    used, made = set(taken), []
    for name in wanted:
        while name in used:
            name += "_in"
        used.add(name)
        made.append(name)
    return made


def check_size(model: ir.Model) -> None:
    """Refuse what one protobuf file cannot hold."""
    total = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    if total > LARGEST:
        raise ExportError(
            f"the model holds {total / 2**30:.1f} GiB of weights, and one ONNX file at most 2; convert it to half "
            "precision, or export parts of it"
        )


def write_model(model: ir.Model, path: Path, *, runs: bool = True) -> None:
    """Complete the model, check it in a file of its own, then move it into place.

    Args:
        model: What to write.
        path: Where.
        runs: False for a graph of other operators, to be looked at: it is written as it is.

    Raises:
        ExportError: If the ONNX checker refuses it, or no file can be written there.
    """
    if runs:
        # The exporter's records of its own run have no place in the file.
        common_passes.ClearMetadataAndDocStringPass()(model)
        common_passes.RemoveUnusedNodesPass()(model)
        add_functions(model)
        unique_names(model)
        _import_opsets(model)
    model.producer_name = "e2pass"
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror}") from error
    os.close(handle)
    try:
        ir.save(model, temporary)
        onnx.checker.check_model(temporary, full_check=runs)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror or error}") from error
    except Exception as error:
        raise ExportError(
            f"the ONNX file of the model is not valid: {first_line(error)}; please report it with the model"
        ) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def unique_names(model: ir.Model) -> None:
    """Give every value in the model's graph a name of its own, branches included: onnxruntime has one scope for all."""
    graph = model.graph
    held = [*graph.inputs, *graph.initializers.values(), *graph.outputs]
    taken = {value.name for value in held}
    kept = set(held)
    for node in ir.traversal.RecursiveGraphIterator(graph):
        for value in node.outputs:
            if value in kept:
                continue
            name, number = value.name or "value", 1
            while name in taken:
                name, number = f"{value.name or 'value'}_{number}", number + 1
            value.name = name
            taken.add(name)


def _import_opsets(model: ir.Model) -> None:
    """Every graph and function names the operator sets that it uses, and no other."""
    owners: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for owner in owners:
        standard = owner.opset_imports.get("", OPSET)
        domains = {node.domain for node in ir.traversal.RecursiveGraphIterator(owner)}
        owner.opset_imports.clear()
        owner.opset_imports.update({d: 1 if d else standard for d in sorted(domains | {""})})
    for function in model.functions.values():
        model.graph.opset_imports.setdefault(function.domain, 1)


def first_line(error: BaseException) -> str:
    """The first line of a message, without its full stop."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[0].strip().rstrip(".") if lines else type(error).__name__
