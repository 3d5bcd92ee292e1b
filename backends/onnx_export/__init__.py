"""Export of the gated model in evaluation mode to ONNX, in standard operators that any runtime has."""

from e2pass.backends.onnx_export.check import check_inference
from e2pass.backends.onnx_export.export import export_inference

__all__ = ["check_inference", "export_inference"]
