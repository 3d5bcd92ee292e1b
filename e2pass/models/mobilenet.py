"""MobileNetV2 (Sandler et al. 2018, "Inverted residuals and linear bottlenecks"), for 32x32 images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from e2pass.errors import InputError

# Table 2 of the paper: expansion, channels, blocks, stride of the first block. On 224x224 images the second row has
# stride 2, and so has the first convolution; both are 1 here, so that a 32x32 image ends at 4x4 instead of 1x1.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
FIRST_CHANNELS = 32
LAST_CHANNELS = 1280


def conv_bn(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1, relu: bool = True
) -> nn.Sequential:
    """Return a convolution that keeps the image size at stride 1, its batch norm, and a ReLU6 if wanted."""
    padding = kernel_size // 2
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)
    layers: list[nn.Module] = [conv, nn.BatchNorm2d(out_channels)]
    if relu:
        layers.append(nn.ReLU6())
    return nn.Sequential(*layers)


class InvertedResidual(nn.Module):
    """Widen with 1x1, filter each channel with 3x3, narrow with 1x1; add the input where the shape is unchanged.

    Shapes: ``(N, in_channels, H, W)`` to ``(N, channels, H / stride, W / stride)``.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        layers = [conv_bn(in_channels, hidden, 1)] if expansion != 1 else []
        layers += [conv_bn(hidden, hidden, 3, stride, groups=hidden), conv_bn(hidden, channels, 1, relu=False)]
        self.body = nn.Sequential(*layers)
        self.residual = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x + body(x)`` where the shapes agree, ``body(x)`` elsewhere."""
        out: Tensor = self.body(x)
        return x + out if self.residual else out


class MobileNetV2(nn.Module):
    """MobileNetV2 at width 1 with the strides of small images.

    Shapes: ``(N, 3, H, W)`` to ``(N, num_classes)``, 32x32 images in the paper.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        in_channels = FIRST_CHANNELS
        for expansion, channels, repeats, first_stride in STAGES:
            for index in range(repeats):
                stride = first_stride if index == 0 else 1
                blocks.append(InvertedResidual(in_channels, channels, stride, expansion))
                in_channels = channels
        self.stem = conv_bn(3, FIRST_CHANNELS, 3)
        self.blocks = nn.Sequential(*blocks)
        self.head = conv_bn(in_channels, LAST_CHANNELS, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(LAST_CHANNELS, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores."""
        x = self.head(self.blocks(self.stem(x)))
        scores: Tensor = self.fc(torch.flatten(self.pool(x), 1))
        return scores


def mobilenet_v2(num_classes: int = 10) -> MobileNetV2:
    """Build MobileNetV2 for 32x32 images, the other network of the E2-Train paper.

    Args:
        num_classes: Width of the output.

    Returns:
        A module that maps ``(N, 3, 32, 32)`` to ``(N, num_classes)``, freshly initialised.

    Raises:
        InputError: If ``num_classes`` is no positive number.

    >>> sum(p.numel() for p in mobilenet_v2().parameters())
    2236682
    """
    if not isinstance(num_classes, int) or num_classes < 1:
        raise InputError(f"mobilenet_v2(num_classes={num_classes!r}): num_classes must be a whole number from 1 up")
    return MobileNetV2(num_classes)
