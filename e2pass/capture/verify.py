"""Does a captured graph do what the model does? Outputs, buffers and gradients, in both modes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from e2pass.capture.binding import Call
from e2pass.capture.output import OutputForm, flatten
from e2pass.capture.state import model_kept, rng_kept, seed_all

_SEED = 20190


@dataclass
class Run:
    """What one call left behind.

    Attributes:
        output: The flat output and its form.
        buffers: Buffers after the call, and before the backward pass.
        moved_in_backward: Names of the buffers that the backward pass then changed, as checkpointed norms do.
        gradients: Gradients of the parameters; None where there is no backward pass, or where it is impossible (a
            model that overwrites what its own backward needs).
    """

    output: tuple[list[Any], OutputForm]
    buffers: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor | None] | None
    moved_in_backward: tuple[str, ...] = ()


def run(model: nn.Module, function: Callable[[], Any], training: bool) -> Run:
    """Call ``function``, which uses ``model``, from a fixed seed; return what it did, and undo it on the model."""
    with rng_kept(), model_kept(model), torch.enable_grad():
        model.train(training)
        for parameter in model.parameters():
            parameter.grad = None
        seed_all(_SEED)
        values, form = flatten(function())
        buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        gradients = _gradients(model, values) if training else None
        moved = tuple(name for name, buffer in model.named_buffers() if not _same(buffer, buffers[name]))
        return Run(([_detached(value) for value in values], form), buffers, gradients, moved)


def run_model(model: nn.Module, call: Call, training: bool) -> Run:
    """Call the model itself."""
    return run(model, lambda: model(*call.args, **call.kwargs), training)


def difference(expected: Run, got: Run) -> str:
    """Return in words the first difference between two runs, ``""`` if there is none."""
    wanted, form = expected.output
    found, found_form = got.output
    if form.spec != found_form.spec or len(wanted) != len(found) or form.constants != found_form.constants:
        return "the output has another structure"
    for i, (a, b) in enumerate(zip(wanted, found, strict=True)):
        if not _same(a, b):
            return f"output {i} differs"
    for name, buffer in expected.buffers.items():
        if not _same(buffer, got.buffers[name]):
            return f"buffer {name} differs after the call"
    if expected.gradients is None:
        return ""
    if got.gradients is None:
        return "its backward pass fails"
    for name, gradient in expected.gradients.items():
        other = got.gradients[name]
        if (gradient is None) != (other is None):
            return f"parameter {name} gets {'a' if gradient is None else 'no'} gradient"
        if gradient is not None and other is not None and not _close(gradient, other):
            return f"the gradient of parameter {name} differs"
    return ""


def _gradients(model: nn.Module, values: Sequence[Any]) -> dict[str, torch.Tensor | None] | None:
    try:
        _backward(values)
    except RuntimeError:
        return None
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def _backward(values: Sequence[Any]) -> None:
    """Send a gradient back that is not the same everywhere: a constant one vanishes in a norm or softmax."""
    total: torch.Tensor | None = None
    for leaf in values:
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
            weights = torch.linspace(-1.0, 1.0, max(leaf.numel(), 1), dtype=torch.float64, device=leaf.device)
            term = (leaf.real.double().reshape(-1) * weights[: leaf.numel()]).sum()
            total = term if total is None else total + term
    if total is not None:
        total.backward()


def _detached(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        return torch.equal(a, b) or bool(torch.equal(torch.nan_to_num(a, 0.5), torch.nan_to_num(b, 0.5)))
    return type(a) is type(b) and bool(a == b)


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Gradients may be summed in another order, so they are close and not bit-equal."""
    scale = float(a.nan_to_num(0.0, 0.0, 0.0).abs().max()) if a.numel() else 0.0
    return bool(torch.allclose(a, b, rtol=1e-4, atol=1e-5 * scale + 1e-12, equal_nan=True))
