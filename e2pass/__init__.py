"""Compiler passes that rewrite a PyTorch model to train with E2-Train, and price the training step.

The public names are imported on first use, so that ``import e2pass`` costs nothing and the command line answers fast.
No module may bear the name of a public function: importing the module would replace the function.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from e2pass import models as models
    from e2pass import optim as optim
    from e2pass.api import analyze as analyze
    from e2pass.api import transform as transform
    from e2pass.averaging import update_bn as update_bn
    from e2pass.config import PRESETS as PRESETS
    from e2pass.config import PSG as PSG
    from e2pass.config import SLU as SLU
    from e2pass.config import SMD as SMD
    from e2pass.config import Bits as Bits
    from e2pass.config import Config as Config
    from e2pass.errors import E2PassError as E2PassError
    from e2pass.report import compare as compare
    from e2pass.step.diff import diff as diff
    from e2pass.step.rates import PredictorHardware as PredictorHardware
    from e2pass.step.rates import Rates as Rates
    from e2pass.torch_backend import psg_backend as psg_backend

__version__ = "0.1.0.dev0"

_MODULES = ("models", "optim")
_HOME = {
    "Bits": "e2pass.config",
    "Config": "e2pass.config",
    "E2PassError": "e2pass.errors",
    "PRESETS": "e2pass.config",
    "PSG": "e2pass.config",
    "SLU": "e2pass.config",
    "SMD": "e2pass.config",
    "PredictorHardware": "e2pass.step.rates",
    "Rates": "e2pass.step.rates",
    "analyze": "e2pass.api",
    "diff": "e2pass.step.diff",
    "compare": "e2pass.report",
    "psg_backend": "e2pass.torch_backend",
    "transform": "e2pass.api",
    "update_bn": "e2pass.averaging",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"e2pass.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'e2pass' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, *_MODULES])
