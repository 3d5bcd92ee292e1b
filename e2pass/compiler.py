"""Whether inductor can compile here."""

from __future__ import annotations

import os
import shutil

from e2pass.errors import ConfigError

_CANDIDATES = ("g++", "clang++", "c++")


def require_compiler() -> None:
    """Return if there is a C++ compiler, which inductor needs on a CPU.

    Raises:
        ConfigError: If there is none.
    """
    chosen = os.environ.get("CXX")
    if not any(shutil.which(name) for name in ((chosen,) if chosen else _CANDIDATES)):
        tried = f"CXX = {chosen}" if chosen else f"none of {', '.join(_CANDIDATES)}"
        raise ConfigError(
            f"compile=True needs a C++ compiler, and {tried} is {'not ' if chosen else ''}on the PATH; install one or "
            "use compile=False"
        )
