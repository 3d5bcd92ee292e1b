"""Leaving no trace: everything that running or tracing a model may change is put back."""

from __future__ import annotations

import contextlib
import io
import logging
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_DICTS = ("_parameters", "_buffers", "_modules")


@contextmanager
def rng_kept() -> Iterator[None]:
    """Restore the random states of torch, Python and numpy on exit."""
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy else None
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)


def seed_all(seed: int) -> None:
    """Seed every generator that a model may draw from."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy:
        numpy.random.seed(seed)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch from printing warnings and partial graphs: a failed attempt becomes a diagnostic, not noise."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    disabled = logger.disabled
    logger.disabled = True
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = disabled


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Restore on exit whether each module is in training: a frozen norm is not, within a model that is."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def model_kept(model: nn.Module) -> Iterator[None]:
    """Restore ``model`` on exit: modes, attributes, registrations, gradients, and the contents of buffers."""
    attributes: list[tuple[nn.Module, dict[str, Any], dict[str, dict[str, Any]]]] = [
        (module, dict(module.__dict__), {name: dict(getattr(module, name)) for name in _DICTS})
        for module in model.modules()
    ]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for module, values, registered in attributes:
            module.__dict__.clear()
            module.__dict__.update(values)
            for name, entries in registered.items():
                getattr(module, name).clear()
                getattr(module, name).update(entries)
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
        for parameter, gradient in gradients:
            parameter.grad = gradient
