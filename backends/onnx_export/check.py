"""Running an exported file beside the model it came from."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from e2pass.backends.onnx_export.files import transformed_module
from e2pass.capture.output import opened
from e2pass.errors import ExportError, InputError
from e2pass.inputs import Inputs
from e2pass.runtime.module import E2Module
from e2pass.verification import relative_difference

if TYPE_CHECKING:
    from e2pass.transformed import Transformed


def check_inference(path: str | Path, module: Transformed | E2Module, inputs: Any) -> float:
    """Run an exported file in onnxruntime and the model, which skips closed blocks for real, on the same inputs.

    Args:
        path: A file that ``export_inference`` wrote.
        module: The model it was written from; it is not changed.
        inputs: As for ``e2pass.transform``.

    Returns:
        The largest difference of any output element, relative to the largest magnitude in that output; infinite where
        only one of the two gives NaN.

    Raises:
        InputError: If there is no such file, or the inputs do not fit the model.
        ExportError: If onnxruntime is not installed, refuses the file, or returns other outputs than the model.
    """
    try:
        import onnxruntime
    except ImportError:
        raise ExportError(
            "onnxruntime is not installed, and the check runs the file in it; pip install 'e2pass[verify]'"
        ) from None
    if not Path(path).is_file():
        raise InputError(f"there is no file {path}; write it with export_inference")
    model = copy.deepcopy(transformed_module(module)).eval()
    call = Inputs.of(inputs)
    tensors = model._executable.capture.bind(call.args, call.kwargs)
    with torch.no_grad():
        output = model(*call.args, **call.kwargs)
    expected = [leaf for leaf in pytree.tree_leaves(opened(output)) if isinstance(leaf, Tensor)]
    try:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        feeds = {i.name: t.detach().numpy() for i, t in zip(session.get_inputs(), tensors, strict=True)}
        found = session.run(None, feeds)
    except Exception as error:
        raise ExportError(f"onnxruntime cannot run {path}: {str(error).strip().splitlines()[0]}") from error
    return max(
        (_difference(Path(path), w, torch.from_numpy(f)) for w, f in zip(expected, found, strict=True)), default=0.0
    )


def _difference(path: Path, wanted: Tensor, found: Tensor) -> float:
    if wanted.shape != found.shape:
        raise ExportError(
            f"{path} gives an output of shape {tuple(found.shape)} where the model gives {tuple(wanted.shape)}; "
            "export it again from this model"
        )
    return relative_difference(wanted, found, torch.finfo(torch.float32).tiny)
