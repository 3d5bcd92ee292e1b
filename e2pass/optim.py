"""Sign-based SGD, for gradients whose signs are not taken yet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from e2pass.errors import ConfigError

Tensors = list[Tensor] | tuple[Tensor, ...]
SignAt = Literal["step", "momentum"]


class SignSGD(Optimizer):
    """SGD on the signs of gradients (Bernstein et al., ICML 2018, "signSGD: compressed optimisation ...").

    PSG takes the signs in backward, where gradients that are accumulated over micro-batches or averaged over ranks
    become a vote. With ``PSG(sign=False)`` the gradients stay values and this optimizer takes the sign of their sum.

    A NaN or an infinity in a gradient makes the parameter NaN, as with SGD; it is not taken for a sign.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        sign_at: SignAt = "step",
        scale: Literal["mean", "unit"] = "unit",
    ) -> None:
        """Keep the settings; groups may hold values of their own.

        Args:
            params: Parameters or groups, such as ``t.param_groups(lr)``; a group with ``sign=False`` (norms, biases
                and gates there) is updated as by ``torch.optim.SGD``.
            lr: Learning rate. With ``scale="unit"`` it is the distance that a weight moves in a step.
            momentum: Decay of the running sum.
            weight_decay: Times the weight, it is added to the signs.
            sign_at: ``step``: signs of the gradients, which momentum sums up (the E2-Train paper's update);
                ``momentum``: signs of the momentum (Signum, in the same publication).
            scale: ``mean`` multiplies each tensor's signs by the mean absolute value of what they are the signs of.

        Raises:
            ConfigError: For a value that is not allowed.
        """
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "sign_at": sign_at, "scale": scale}
        _check(settings)
        super().__init__(params, {**settings, "sign": True})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, whose own values are checked as the optimizer's are."""
        _check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; returns what ``closure`` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._update(group, parameters, [p.grad for p in parameters])
        return loss

    def _update(self, group: dict[str, Any], parameters: list[Tensor], gradients: Tensors) -> None:
        updates: Tensors
        momentum_signs = group["sign"] and group["sign_at"] == "momentum"
        if momentum_signs:
            updates = _signs(self._momentum(group, parameters, gradients), group["scale"])
        else:
            updates = _signs(gradients, group["scale"]) if group["sign"] else gradients
        if group["weight_decay"]:
            updates = torch._foreach_add(updates, parameters, alpha=group["weight_decay"])
        if not momentum_signs:
            updates = self._momentum(group, parameters, updates)
        torch._foreach_add_(parameters, updates, alpha=-group["lr"])

    def _momentum(self, group: dict[str, Any], parameters: list[Tensor], updates: Tensors) -> Tensors:
        if not group["momentum"]:
            return updates
        held = []
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            held.append(state["momentum_buffer"])
        torch._foreach_mul_(held, group["momentum"])
        torch._foreach_add_(held, updates)
        return held


def is_number(value: object) -> bool:
    """Whether something is a finite real number, or a tensor that holds one."""
    if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
        return False
    return (not isinstance(value, Tensor) or value.numel() == 1) and math.isfinite(value)


def _check(group: dict[str, Any]) -> None:
    lr, momentum, weight_decay = group["lr"], group["momentum"], group["weight_decay"]
    numbers = all(map(is_number, (lr, momentum, weight_decay)))
    if not numbers or lr < 0 or weight_decay < 0 or not 0 <= momentum < 1:
        raise ConfigError(
            f"SignSGD(lr={lr!r}, momentum={momentum!r}, weight_decay={weight_decay!r}) is not allowed: lr and "
            "weight_decay are numbers from 0, momentum one from 0 to less than 1"
        )
    if group["sign_at"] not in get_args(SignAt):
        raise ConfigError(f"sign_at = {group['sign_at']!r} is not allowed; choose {' or '.join(get_args(SignAt))}")
    if group["scale"] not in ("mean", "unit"):
        raise ConfigError(f"scale = {group['scale']!r} is not allowed; choose mean or unit")


def _signs(values: Tensors, scale: str) -> list[Tensor]:
    signs = list(torch._foreach_sign(values))
    torch._foreach_add_(signs, torch._foreach_mul(values, 0.0))  # torch's sign of NaN is 0
    if scale == "mean":
        means = [norm / value.numel() for norm, value in zip(torch._foreach_norm(values, 1), values, strict=True)]
        torch._foreach_mul_(signs, means)
    return signs
