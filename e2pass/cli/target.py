"""What the command line is given as text: which model to build, and the shapes of its inputs."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from e2pass.errors import E2PassError, InputError

if TYPE_CHECKING:
    import torch
    from torch import nn

DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "bool")
_INPUT = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<dims>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?")


def build_model(target: str, kwargs: str | None = None) -> nn.Module:
    """Build the model that ``target`` names.

    Args:
        target: ``package.module:callable`` or ``path/to/file.py:callable``; the callable returns an ``nn.Module``.
            A module's attribute that is a model already is taken as it is.
        kwargs: Keyword arguments of the callable as a JSON object.

    Raises:
        InputError: If there is no such module, file or callable, or it does not return a module.
    """
    from torch import nn

    where, _, name = target.rpartition(":")
    if not where or not name:
        raise InputError(f"MODEL {target!r} is not package.module:callable or path/to/file.py:callable")
    arguments = parse_kwargs(kwargs)
    with _neighbours_importable(where):
        found = _attribute(_module(where), where, name)
        if isinstance(found, nn.Module):
            if arguments:
                raise InputError(f"{target} is a model already and takes no arguments, but {kwargs} was given")
            return found
        if not callable(found):
            kind = type(found).__name__
            raise InputError(f"{target} is a {kind}; a callable that returns a torch.nn.Module is needed")
        model = _call(found, target, arguments)
    if not isinstance(model, nn.Module):
        raise InputError(f"{target} returned a {type(model).__name__}; a torch.nn.Module is needed")
    return model


def parse_kwargs(text: str | None) -> dict[str, Any]:
    """Parse a JSON object of keyword arguments; None is none.

    Raises:
        InputError: If it is no JSON object.
    """
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"the arguments {text!r} are not JSON ({error}); write e.g. '{{\"depth\": 20}}'") from None
    if not isinstance(value, dict):
        raise InputError(f"the arguments {text!r} are no JSON object; write e.g. '{{\"depth\": 20}}'")
    return value


def parse_inputs(texts: Sequence[str]) -> Any:
    """Make example inputs: random numbers, or zeros for whole numbers and bools (zero is a valid token everywhere).

    Args:
        texts: Each ``[NAME=]DIMS[:DTYPE]``, such as ``128x3x32x32``, ``8x16:int64`` or ``input_ids=8x16:int64``.

    Returns:
        One tensor, a tuple of tensors, or a dict of them where names are given.

    Raises:
        InputError: If one is not of that form, or some have names and others have not.
    """
    parsed = [_parse_input(text) for text in texts]
    names = [name for name, _ in parsed if name]
    if names and len(names) < len(parsed):
        raise InputError("either every --input has a name (NAME=DIMS) or none has")
    if len(set(names)) < len(names):
        raise InputError(f"--input names {', '.join(names)} are not all different")
    if names:
        return dict(parsed)
    tensors = tuple(tensor for _, tensor in parsed)
    return tensors[0] if len(tensors) == 1 else tensors


def _parse_input(text: str) -> tuple[str, torch.Tensor]:
    import torch

    match = _INPUT.fullmatch(text)
    if match is None:
        raise InputError(f"--input {text!r} is not [NAME=]DIMS[:DTYPE], such as 128x3x32x32 or input_ids=8x16:int64")
    shape = [int(size) for size in match["dims"].split("x")]
    if 0 in shape:
        raise InputError(f"--input {text!r} has a size of 0; every size is at least 1")
    dtype = match["dtype"] or "float32"
    if dtype not in DTYPES:
        raise InputError(f"--input {text!r}: unknown type {dtype!r}; choose one of {', '.join(DTYPES)}")
    kind: torch.dtype = getattr(torch, dtype)
    try:
        tensor = torch.randn(shape).to(kind) if kind.is_floating_point else torch.zeros(shape, dtype=kind)
    except RuntimeError:
        raise InputError(f"--input {text!r} does not fit into memory") from None
    return match["name"] or "", tensor


@contextmanager
def _neighbours_importable(where: str) -> Iterator[None]:
    """As with `python path` and `python -m`: what lies beside a file, or beside the caller, can be imported."""
    folder = str(Path(where).resolve().parent) if where.endswith(".py") else ""
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with suppress(ValueError):  # the target may have changed the path
            sys.path.remove(folder)


def _module(where: str) -> ModuleType:
    return _file_module(Path(where)) if where.endswith(".py") else _named_module(where)


def _named_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise InputError(f"cannot import {name}: {error}") from None
    except E2PassError:
        raise
    except Exception as error:
        raise InputError(f"importing {name} failed: {_words(error)}") from None


def _file_module(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    name = f"e2pass_target_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class up by its module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"running {path} failed: {_words(error)}") from None
    return module


def _attribute(module: ModuleType, where: str, name: str) -> Any:
    try:
        return getattr(module, name)
    except AttributeError:
        public = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise InputError(f"{where} has no {name!r}; it has {', '.join(public) or 'no callables'}") from None


def _call(build: Callable[..., Any], target: str, arguments: dict[str, Any]) -> Any:
    try:
        return build(**arguments)
    except E2PassError:
        raise
    except Exception as error:
        raise InputError(f"{target} with arguments {json.dumps(arguments)} failed: {_words(error)}") from None


def _words(error: Exception) -> str:
    """An error that has no words is known by its kind."""
    return ": ".join(filter(None, (type(error).__name__, str(error))))
