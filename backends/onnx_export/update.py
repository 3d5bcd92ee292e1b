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
from e2pass.optim import SignSGD, is_number

State = dict[str, Tensor]
Rule = Callable[[Tensor, Tensor, State, Tensor, Mapping[str, Any]], tuple[Tensor, State]]
"""``(parameter, gradient, state, learning rate, options)`` to the new parameter and state."""


def sgd(p: Tensor, grad: Tensor, state: State, lr: Tensor, options: Mapping[str, Any]) -> tuple[Tensor, State]:
    """``torch.optim.SGD``, once there is a momentum to damp."""
    if options["maximize"]:
        grad = -grad
    if options["weight_decay"]:
        grad = grad + options["weight_decay"] * p
    if not options["momentum"]:
        return p - lr * grad, {}
    momentum = options["momentum"] * state["momentum_buffer"] + (1 - options["dampening"]) * grad
    step = grad + options["momentum"] * momentum if options["nesterov"] else momentum
    return p - lr * step, {"momentum_buffer": momentum}


def adam(p: Tensor, grad: Tensor, state: State, lr: Tensor, options: Mapping[str, Any]) -> tuple[Tensor, State]:
    """``torch.optim.Adam``, and ``AdamW`` where the weight decay is decoupled."""
    beta1, beta2 = options["betas"]
    if options["maximize"]:
        grad = -grad
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
    new = {"step": step, "exp_avg": first, "exp_avg_sq": second}
    largest = second
    if options["amsgrad"]:
        largest = new["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], second)
    spread = largest.sqrt() / weight2.sqrt() + options["eps"]
    return p - size * first / spread, new


def sign_sgd(p: Tensor, grad: Tensor, state: State, lr: Tensor, options: Mapping[str, Any]) -> tuple[Tensor, State]:
    """``e2pass.optim.SignSGD``; a group without signs is updated as by SGD."""
    momentum, of_momentum = options["momentum"], options["sign"] and options["sign_at"] == "momentum"
    step, new = grad, {}
    if of_momentum:
        if momentum:
            step = new["momentum_buffer"] = momentum * state["momentum_buffer"] + step
        step = _sign(step, options["scale"])
    elif options["sign"]:
        step = _sign(step, options["scale"])
    if options["weight_decay"]:
        step = step + options["weight_decay"] * p
    if momentum and not of_momentum:
        step = new["momentum_buffer"] = momentum * state["momentum_buffer"] + step
    return p - lr * step, new


def _sign(value: Tensor, scale: str) -> Tensor:
    sign = value.sign() + value * 0.0  # torch's sign of NaN is 0
    return sign * value.abs().mean() if scale == "mean" else sign


_ADAM = ("betas", "eps", "weight_decay", "decoupled_weight_decay", "amsgrad", "maximize")
_RULES: dict[type[torch.optim.Optimizer], tuple[Rule, tuple[str, ...]]] = {
    torch.optim.SGD: (sgd, ("momentum", "nesterov", "weight_decay", "dampening", "maximize")),
    torch.optim.Adam: (adam, _ADAM),
    torch.optim.AdamW: (adam, _ADAM),
    SignSGD: (sign_sgd, ("momentum", "weight_decay", "sign", "sign_at", "scale")),
}
STATES = ("momentum_buffer", "step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
"""What these optimizers keep of a parameter."""


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


def check_damped(optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    """Refuse dampening without a momentum: the first step is then of another kind than all others.

    Raises:
        ConfigError: If a parameter has none; the message names it.
    """
    damped = [g for g in optimizer.param_groups if g.get("dampening") and g["momentum"]]
    ids = {id(p) for g in damped for p in g["params"] if optimizer.state.get(p, {}).get("momentum_buffer") is None}
    name = next((name for name, p in module.named_parameters() if id(p) in ids and p.requires_grad), None)
    if name is not None:
        raise ConfigError(
            f"{name} has no momentum yet, and with dampening SGD takes its first gradient undamped, which the exported "
            "step would not; take a step in PyTorch first, or set dampening=0"
        )


def _present_state(rule: Rule, options: Mapping[str, Any], held: Mapping[str, Any], p: Tensor) -> State:
    if rule is adam:
        kept = STATES[2:] if options["amsgrad"] else STATES[2:-1]
        wanted = {"step": torch.zeros(()), **{key: torch.zeros_like(p) for key in kept}}
    else:
        wanted = {"momentum_buffer": torch.zeros_like(p)} if options["momentum"] else {}
    found = {key: held.get(key) for key in wanted}
    return {k: v.detach().clone() if (v := found[k]) is not None else w.detach() for k, w in wanted.items()}


def state_tensors(module: nn.Module, update: Update) -> dict[str, Tensor]:
    """Learning rates, parameters, buffers and optimizer states, by their names as inputs of the exported step.

    Raises:
        ExportError: If two of them have one name.
    """
    state = {name: p.detach() for name, p in module.named_parameters()} | dict(module.named_buffers())
    added = {
        f"lr.{g.name}": torch.tensor(g.lr, dtype=torch.float64 if _double(state, g) else torch.float32)
        for g in update.groups
    }
    for name, held in update.state.items():
        added |= {f"{name}.{key}": value for key, value in held.items()}
    both = next((name for name in added if name in state), None)
    if both is not None:
        raise ExportError(
            f"the model has a tensor named {both}, the exported step's name of a learning rate or optimizer state; "
            "rename the module, parameter or parameter group"
        )
    return added | state


def _double(state: Mapping[str, Tensor], group: Group) -> bool:
    return any(state[name].dtype == torch.float64 for name in group.parameters)
