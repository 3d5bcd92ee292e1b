"""Names of parameters: aliases of tied weights, and which region uses what."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import fx, nn

from e2pass.errors import ConfigError
from e2pass.plan import Region


def parameter_names(model: nn.Module) -> dict[str, str]:
    """Every name of every parameter, mapped to the name under which it is registered first."""
    first: dict[int, str] = {}
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[name] = first.setdefault(id(parameter), name)
    return names


def matching(model: nn.Module, patterns: Sequence[str], option: str) -> frozenset[str]:
    """Every name of the parameters that one of the shell patterns fits, under whichever of their names.

    Raises:
        ConfigError: For a pattern that fits no parameter; ``option`` says where it was given.
    """
    canonical = parameter_names(model)
    owners = set()
    for pattern in patterns:
        fitting = {owner for name, owner in canonical.items() if fnmatchcase(name, pattern)}
        if not fitting:
            some = ", ".join(list(canonical)[:3])
            raise ConfigError(f"{option}: {pattern!r} fits no parameter; the model's are {some}, ...")
        owners |= fitting
    return frozenset(name for name, owner in canonical.items() if owner in owners)


def region_parameters(region: Region, model: nn.Module) -> list[str]:
    """Names of the parameters that a region uses, directly or in the modules it calls."""
    found: list[str] = []
    for node in region.graph.nodes:
        if node.op == "call_module":
            module = model.get_submodule(str(node.target))
            found += [name for name, _ in module.named_parameters(prefix=str(node.target), remove_duplicate=False)]
        elif node.op == "get_attr" and isinstance(_attribute(model, str(node.target)), nn.Parameter):
            found.append(str(node.target))
    return found


def gradient_flow(owner: nn.Module, graph: fx.Graph, gates_learn: bool = False) -> dict[fx.Node, bool]:
    """Which values of a flat graph depend on a parameter, or a learning gate, that wants a gradient."""
    flow: dict[fx.Node, bool] = {}
    for node in graph.nodes:
        own = False
        if node.meta.get("e2_tag") == "slu.gate":
            own = gates_learn
        elif node.op == "call_module":
            own = any(p.requires_grad for p in owner.get_submodule(str(node.target)).parameters())
        elif node.op == "get_attr":
            own = bool(getattr(_attribute(owner, str(node.target)), "requires_grad", False))
        flow[node] = own or (node.meta.get("e2_tag") != "slu.gate" and any(flow[n] for n in node.all_input_nodes))
    return flow


def _attribute(model: nn.Module, target: str) -> Any:
    value: Any = model
    for part in target.split("."):
        value = getattr(value, part, None)
    return value
