"""Capture: from any ``nn.Module`` to flat ``torch.fx`` graphs over the module's own parameters."""

from e2pass.capture.ladder import Capture, capture

__all__ = ["Capture", "capture"]
