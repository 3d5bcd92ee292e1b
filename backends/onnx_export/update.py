"""The optimizer's update of one parameter as a function of tensors, for the training step that is exported.

The formulas are those of ``torch.optim``; the learning rate is an input, so that a schedule can move it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from e2pass.errors import ConfigError, ExportError, InputError
from e2pass.optim import is_number

State = dict[str, Tensor]
Rule = Callable[[Tensor, Tensor, State, Tensor, Mapping[str, Any]], tuple[Tensor, State]]
"""``(parameter, gradient, state, learning rate, options)`` to the new parameter and state."""


def sgd(p: Tensor, grad: Tensor, state: State, lr: Tensor, options: Mapping[str, Any]) -> tuple[Tensor, State]:
    """``torch.optim.SGD`` without dampening."""
    if options["weight_decay"]:
        grad = grad + options["weight_decay"] * p
    if not options["momentum"]:
        return p - lr * grad, {}
    momentum = options["momentum"] * state["momentum_buffer"] + grad
    step = grad + options["momentum"] * momentum if options["nesterov"] else momentum
    return p - lr * step, {"momentum_buffer": momentum}


def adam(p: Tensor, grad: Tensor, state: State, lr: Tensor, options: Mapping[str, Any]) -> tuple[Tensor, State]:
    """``torch.optim.Adam``, and ``AdamW`` where the weight decay is decoupled."""
    beta1, beta2 = options["betas"]
    if options["weight_decay"]:
        if options["decoupled_weight_decay"]:
            p = p * (1 - lr * options["weight_decay"])
        else:
            grad = grad + options["weight_decay"] * p
    step = state["step"] + 1
    first = torch.lerp(state["exp_avg"], grad, 1 - beta1)
    second = beta2 * state["exp_avg_sq"] + (1 - beta2) * grad * grad
    # In double precision: close to 1 a power loses what is left of it in single.
    weight1, weight2 = ((1 - beta ** step.double()).to(p.dtype) for beta in (beta1, beta2))
    size = lr / weight1
    spread = second.sqrt() / weight2.sqrt() + options["eps"]
    return p - size * first / spread, {"step": step, "exp_avg": first, "exp_avg_sq": second}


_RULES: dict[type[torch.optim.Optimizer], tuple[Rule, tuple[str, ...]]] = {
    torch.optim.SGD: (sgd, ("momentum", "nesterov", "weight_decay")),
    torch.optim.Adam: (adam, ("betas", "eps", "weight_decay", "decoupled_weight_decay")),
    torch.optim.AdamW: (adam, ("betas", "eps", "weight_decay", "decoupled_weight_decay")),
}
_REFUSED = {"dampening": 0, "amsgrad": False, "maximize": False}


@dataclass(frozen=True)
class Group:
    """Parameters with the same rule.

    Attributes:
        name: Of the learning rate's input.
        lr: Present learning rate.
        rule: Update of one parameter.
        options: What the rule reads.
        parameters: Their names.
    """

    name: str
    lr: float
    rule: Rule
    options: Mapping[str, Any]
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Update:
    """The update of all parameters.

    Attributes:
        groups: As in the optimizer.
        state: Present state of each parameter, zero where the optimizer has none yet.
    """

    groups: tuple[Group, ...]
    state: Mapping[str, State]


def update_of(optimizer: torch.optim.Optimizer, module: nn.Module) -> Update:
    """The update that ``optimizer`` makes of the parameters of ``module``.

    Raises:
        ConfigError: If there is no rule for the optimizer, or for one of its options.
        InputError: If it holds parameters that are not the module's.
    """
    if type(optimizer) not in _RULES:
        known = ", ".join(t.__name__ for t in _RULES)
        raise ConfigError(f"the update of {type(optimizer).__name__} cannot be exported; those that can are {known}")
    rule, keys = _RULES[type(optimizer)]
    names = {id(p): n for n, p in module.named_parameters()}
    groups: list[Group] = []
    states: dict[str, State] = {}
    for index, group in enumerate(optimizer.param_groups):
        if not is_number(group["lr"]) or group["lr"] < 0:
            raise ConfigError(f"the optimizer's learning rate {group['lr']!r} is not allowed; it is a number from 0")
        for option, neutral in _REFUSED.items():
            if group.get(option, neutral) != neutral:
                raise ConfigError(f"{type(optimizer).__name__} with {option} = {group[option]!r} cannot be exported")
        foreign = [p for p in group["params"] if id(p) not in names]
        if foreign:
            raise InputError("the optimizer holds parameters that are not the model's; build it over t.param_groups()")
        trained = [p for p in group["params"] if p.requires_grad]
        name = str(group.get("name", index)).replace(" ", "_")
        if any(name == other.name for other in groups):
            name = f"{name}_{index}"
        options = {key: group[key] for key in keys if key in group}
        groups.append(Group(name, float(group["lr"]), rule, options, tuple(names[id(p)] for p in trained)))
        for p in trained:
            states[names[id(p)]] = _present_state(rule, options, optimizer.state.get(p, {}), p)
    return Update(tuple(groups), states)


def _present_state(rule: Rule, options: Mapping[str, Any], held: Mapping[str, Any], p: Tensor) -> State:
    if rule is sgd:
        wanted = {"momentum_buffer": torch.zeros_like(p)} if options["momentum"] else {}
    else:
        wanted = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    found = {key: held.get(key) for key in wanted}
    return {k: v.detach().clone() if (v := found[k]) is not None else w.detach() for k, w in wanted.items()}


def state_tensors(module: nn.Module, update: Update) -> dict[str, Tensor]:
    """Learning rates, parameters, buffers and optimizer states, by their names as inputs of the exported step.

    Raises:
        ExportError: If two of them have one name.
    """
    state = {name: p.detach() for name, p in module.named_parameters()} | dict(module.named_buffers())
    added = {f"lr.{group.name}": torch.tensor(group.lr) for group in update.groups}
    for name, held in update.state.items():
        added |= {f"{name}.{key}": value for key, value in held.items()}
    both = next((name for name in added if name in state), None)
    if both is not None:
        raise ExportError(
            f"the model has a tensor named {both}, the exported step's name of a learning rate or optimizer state; "
            "rename the module, parameter or parameter group"
        )
    return added | state
