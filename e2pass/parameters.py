"""Names of parameters: aliases of tied weights, and which region uses what."""

from __future__ import annotations

from typing import Any

from torch import nn

from e2pass.plan import Region


def parameter_names(model: nn.Module) -> dict[str, str]:
    """Every name of every parameter, mapped to the name under which it is registered first."""
    first: dict[int, str] = {}
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[name] = first.setdefault(id(parameter), name)
    return names


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


def _attribute(model: nn.Module, target: str) -> Any:
    value: Any = model
    for part in target.split("."):
        value = getattr(value, part, None)
    return value
