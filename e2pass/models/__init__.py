"""The networks of the E2-Train paper, as plain modules that know nothing of e2pass."""

from __future__ import annotations

from e2pass.models.cifar_resnet import ResNet, resnet
from e2pass.models.mobilenet import MobileNetV2, mobilenet_v2

__all__ = ["MobileNetV2", "ResNet", "mobilenet_v2", "resnet"]
