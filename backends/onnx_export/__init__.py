"""Export to ONNX, in standard operators that any runtime has: the trained model, and the whole training step."""

from e2pass.backends.onnx_export.bring_back import load_training_state
from e2pass.backends.onnx_export.check import check_inference
from e2pass.backends.onnx_export.inference import export_inference
from e2pass.backends.onnx_export.training import export_training, training_state

__all__ = ["check_inference", "export_inference", "export_training", "load_training_state", "training_state"]
