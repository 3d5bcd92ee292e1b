"""The way back: what a device has trained with an exported step, into the model and its optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from e2pass.backends.onnx_export.files import transformed_module
from e2pass.backends.onnx_export.update import STATES, update_of
from e2pass.errors import InputError
from e2pass.runtime.module import E2Module

if TYPE_CHECKING:
    from e2pass.transformed import Transformed


def load_training_state(
    t_or_module: Transformed | E2Module,
    values: Mapping[str, Any] | str | Path,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Put the state that an exported training step has reached back into the model, in place.

    The step's names are those of the state dict, so ``t.unwrap()`` is then the trained model of the original class, and
    training goes on in PyTorch where the device stopped.

    Args:
        t_or_module: What ``export_training`` was given.
        values: Arrays by name, ``NAME`` or ``next.NAME``: outputs of the last step, or a file of them that
            ``numpy.savez`` wrote. What they do not name stays as it is; ``loss`` and gradients are passed over.
        optimizer: The optimizer that was exported, which gets its states and learning rates; None leaves them out.

    Raises:
        InputError: If a name or a shape is not one of the model; then nothing was changed.
    """
    module = transformed_module(t_or_module)
    arrays = _arrays(values)
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    states = {f"{name}.{key}": (name, key) for name, _ in module.named_parameters() for key in STATES}
    rates = _rates(optimizer, module)
    unknown = [n for n in arrays if n not in own and n not in states and not n.startswith("lr.")]
    if unknown or not arrays.keys() & own.keys():
        what = f"{unknown[0]!r} is none of its names" if unknown else "it names no tensor of the model"
        raise InputError(f"the state is not one of this model's training step: {what}")
    found = {name: torch.as_tensor(array) for name, array in arrays.items()}
    for name, value in found.items():
        wanted = _shape(name, own, states)
        if value.shape != wanted:
            raise InputError(
                f"{name!r} is of shape {list(value.shape)} in the state, and of {list(wanted)} in the model"
            )
    with torch.no_grad():
        for name in found.keys() & own.keys():
            own[name].copy_(found[name])
        if optimizer is None:
            return
        for name in found.keys() & states.keys():
            parameter, key = states[name]
            dtype = torch.float32 if key == "step" else own[parameter].dtype
            optimizer.state[own[parameter]][key] = found[name].to(dtype).clone()
        for name in found.keys() & rates.keys():
            rates[name]["lr"] = float(found[name])


def _arrays(values: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    if isinstance(values, str | Path):
        if not Path(values).is_file():
            raise InputError(f"there is no file {values}")
        try:
            with np.load(values) as file:
                values = dict(file)
        except (ValueError, OSError, EOFError) as error:
            raise InputError(f"{values} is no file of arrays that numpy.savez wrote ({type(error).__name__})") from None
    if not isinstance(values, Mapping):
        raise InputError(
            f"a training state is a mapping of names to arrays, or a file of one, not a {type(values).__name__}"
        )
    plain = {str(name).removeprefix("next."): array for name, array in values.items()}
    return {name: array for name, array in plain.items() if name != "loss" and not name.startswith("grad.")}


def _rates(optimizer: torch.optim.Optimizer | None, module: E2Module) -> dict[str, dict[str, Any]]:
    if optimizer is None:
        return {}
    names = [f"lr.{group.name}" for group in update_of(optimizer, module).groups]
    return dict(zip(names, optimizer.param_groups, strict=True))


def _shape(name: str, own: Mapping[str, Tensor], states: Mapping[str, tuple[str, str]]) -> torch.Size:
    if name in own:
        return own[name].shape
    parameter, key = states.get(name, ("", ""))
    return own[parameter].shape if parameter and key != "step" else torch.Size()
