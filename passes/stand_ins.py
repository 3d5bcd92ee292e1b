"""What stands in for numbers that would hide, or fake, that samples are mixed: parameters, inputs, random draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_SMALL = 1e-3


def awake(owner: nn.Module) -> dict[str, Tensor]:
    """Values of a common size for all parameters that are constant or next to zero, as at the start of training.

    Behind a zero-initialised layer nothing can be seen of what comes before it; nor behind a gate of ``1 - 1``.
    """
    made: dict[Tensor, Tensor] = {}
    for parameter in owner.parameters():
        if not parameter.is_floating_point() or not parameter.numel():
            continue
        first = parameter.flatten()[0]
        if parameter.abs().max() < _SMALL:
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
            made[parameter] = torch.randn_like(parameter) * fan_in**-0.5
        elif bool((parameter == first).all()):
            made[parameter] = (torch.rand_like(parameter) + 0.5) * first.sign()
    return {n: made[p] for n, p in owner.named_parameters(remove_duplicate=False) if p in made}


def normal(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Normal numbers with the type and the device of ``like``."""
    return torch.randn(shape, dtype=like.dtype, device=like.device)


def noisy(value: Any) -> Any:
    """Different values for all samples, in a tensor whose numbers are finite; none below zero where there was none."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or not value.isfinite().all():
        return value
    magnitude = value.abs().mean()
    noise = torch.randn_like(value) * torch.where(magnitude > 0, magnitude, 1.0)
    return value + (noise.abs() if value.numel() and value.min() >= 0 else noise)


_SETTINGS = {"dropout_p": 0.0, "train": False, "training": False}
_DRAWS = {
    **dict.fromkeys(("rand", "rand_like", "randn", "randn_like", "uniform", "normal", "normal_functional"), 0.5),
    **dict.fromkeys(("log_normal", "exponential", "cauchy"), 0.5),
    **dict.fromkeys(("bernoulli", "geometric", "poisson", "binomial"), 1.0),
    **dict.fromkeys(("randint", "randint_like", "random", "multinomial"), 0.0),
}


class WithoutChance(TorchDispatchMode):
    """Dropout keeps everything, draws are constant, permutations reverse, batch norms use their running statistics.

    So two runs on different numbers of samples can be compared.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator."""
        name = func._schema.name.partition("::")[2].rstrip("_")
        names = [a.name for a in func._schema.arguments]
        given: dict[str, Any] = dict(zip(names, args, strict=False)) | (kwargs or {})
        if "running_mean" not in names or given["running_mean"] is not None:
            given.update({setting: value for setting, value in _SETTINGS.items() if setting in given})
        result = func(
            *[given[n] for n in names[: len(args)]], **{n: v for n, v in given.items() if n in (kwargs or {})}
        )
        if name == "randperm":
            return result.copy_(torch.arange(len(result), device=result.device).flip(0))
        if name in _DRAWS:
            result.fill_(given.get("low", given.get("from", _DRAWS[name])))
        return result
