"""Every exception that e2pass raises for a reason a user can act on.

A message is one sentence: what was found, where, and what is allowed. Broken internal invariants raise
``VerifyError``; everything else below is about the caller's input.
"""


class E2PassError(Exception):
    """Root of all e2pass errors."""


class ConfigError(E2PassError, ValueError):
    """A configuration key, value, preset or board name that does not exist or is out of range."""


class InputError(E2PassError, ValueError):
    """A model, example input or argument of the wrong kind or shape."""


class CaptureError(E2PassError):
    """No rung of the capture ladder produced a graph of the model."""


class LoweringError(E2PassError):
    """A region could not be turned into a joint forward+backward graph."""


class PassError(E2PassError):
    """A pass failed, or broke its own contract; the message names the pass and the passes before it."""


class VerifyError(PassError):
    """The verifier found a broken invariant after a pass."""


class LoaderError(E2PassError, ValueError):
    """A data loader that mini-batch dropping cannot work on."""


class BoardError(E2PassError, ValueError):
    """A board description that is missing, malformed or out of bounds."""


class ExportError(E2PassError):
    """A model or graph that cannot be written in the wanted format."""


class StrictError(E2PassError):
    """``strict=True`` and some part of the model could not be transformed."""
