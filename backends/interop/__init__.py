"""The training step in the formats of neighbouring tools: ZigZag, SCALE-Sim, Model Explorer, and ONNX viewers."""

from e2pass.backends.interop.annotated import write_annotated
from e2pass.backends.interop.model_explorer import write_model_explorer
from e2pass.backends.interop.scalesim import write_scalesim
from e2pass.backends.interop.zigzag import write_zigzag

__all__ = ["write_annotated", "write_model_explorer", "write_scalesim", "write_zigzag"]
