"""Where a traced operation came from: source line and module path."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Iterator
from types import FrameType

import torch

_TORCH = os.path.dirname(torch.__file__) + os.sep
_STDLIB = os.path.dirname(os.__file__) + os.sep
_HERE = os.path.dirname(__file__) + os.sep
_LADDER = os.path.join(_HERE, "ladder.py")  # what is below it on the stack is the caller, not the model
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def is_user_file(path: str) -> bool:
    """Whether a source file may be the model's: it is neither torch's, nor Python's, nor of this folder."""
    if path.startswith((_TORCH, _HERE, "<")):
        return False
    return "site-packages" in path or not path.startswith(_STDLIB)


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def current_line() -> str:
    """Return ``file.py:12`` of the innermost running line of the model's code; ``""`` if all of it is torch's."""
    return line_of_frame(sys._getframe(1))


def line_of_frame(innermost: FrameType) -> str:
    """Return ``file.py:12`` of the line of the model's code that ``innermost`` is in or was called by, or ``""``."""
    for frame in _frames(innermost):
        if frame.f_code.co_filename == _LADDER:
            return ""
        if is_user_file(frame.f_code.co_filename):
            return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
    return ""


def line_of_trace(stack_trace: str | None) -> str:
    """Return ``file.py:12`` of the innermost user frame of a node's ``stack_trace``, or ``""``."""
    for path, line in reversed(_FRAME.findall(stack_trace or "")):
        if is_user_file(path):
            return f"{os.path.basename(path)}:{line}"
    return ""


def line_of_error(error: BaseException) -> str:
    """Return ``file.py:12 (source text)`` of the innermost user frame that ``error`` passed, or ``""``."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if is_user_file(frame.filename):
            return f"{os.path.basename(frame.filename)}:{frame.lineno} ({frame.line})"
    return ""


def first_sentence(error: BaseException) -> str:
    """Return the first line of an error's message, with its class, without trailing punctuation."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


def explain(error: BaseException) -> str:
    """Return one sentence: what went wrong, and in which line of the model."""
    line = line_of_error(error)
    return first_sentence(error) + (f", at {line}" if line else "")
