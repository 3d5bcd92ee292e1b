"""The CIFAR ResNet of He et al. 2016 ("Deep residual learning for image recognition", section 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from e2pass.errors import InputError

STAGE_CHANNELS = (16, 32, 64)


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """Return a 3x3 convolution that keeps the image size at stride 1 and has no bias, since a norm follows."""
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a skip path: the identity, or a 1x1 convolution where the shape changes.

    Shapes: ``(N, in_channels, H, W)`` to ``(N, channels, H / stride, W / stride)``.
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = conv3x3(channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.projection: nn.Sequential | None = None
        if stride != 1 or in_channels != channels:
            self.projection = nn.Sequential(
                nn.Conv2d(in_channels, channels, kernel_size=1, stride=stride, bias=False),
                nn.BatchNorm2d(channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return ``relu(skip(x) + body(x))``."""
        skip = x if self.projection is None else self.projection(x)
        body = self.relu1(self.bn1(self.conv1(x)))
        body = self.bn2(self.conv2(body))
        out: Tensor = self.relu2(body + skip)
        return out


class ResNet(nn.Module):
    """A ResNet for small images: three stages of ``blocks_per_stage`` basic blocks with 16, 32 and 64 channels.

    Shapes: ``(N, 3, H, W)`` to ``(N, num_classes)``, 32x32 images in the paper.
    """

    def __init__(self, blocks_per_stage: int, num_classes: int = 10) -> None:
        super().__init__()
        first = STAGE_CHANNELS[0]
        self.conv = conv3x3(3, first)
        self.bn = nn.BatchNorm2d(first)
        self.relu = nn.ReLU()
        stages: list[nn.Sequential] = []
        in_channels = first
        for channels in STAGE_CHANNELS:
            blocks = [BasicBlock(in_channels, channels, stride=channels // in_channels)]
            blocks += [BasicBlock(channels, channels) for _ in range(blocks_per_stage - 1)]
            stages.append(nn.Sequential(*blocks))
            in_channels = channels
        self.stage1, self.stage2, self.stage3 = stages
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(in_channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores."""
        x = self.relu(self.bn(self.conv(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        scores: Tensor = self.fc(torch.flatten(self.pool(x), 1))
        return scores


def resnet(depth: int, num_classes: int = 10) -> ResNet:
    """Build the CIFAR ResNet with ``depth = 6n + 2`` layers, the E2-Train paper's network at 38, 74 and 110.

    The skip path of a block that changes the shape is a strided 1x1 convolution with batch norm, as in the SkipNet
    and E2-Train experiments (He et al. pad with zeros instead).

    Args:
        depth: Number of weighted layers along the main path: 8, 14, 20, ..., 38, 74, 110.
        num_classes: Width of the output.

    Returns:
        A module that maps ``(N, 3, 32, 32)`` to ``(N, num_classes)``, freshly initialised.

    Raises:
        InputError: If ``depth`` is not 6n + 2 with n >= 1, or ``num_classes`` is no positive number.

    >>> sum(p.numel() for p in resnet(38).parameters())
    564122
    """
    if not isinstance(depth, int) or depth < 8 or (depth - 2) % 6:
        raise InputError(f"resnet(depth={depth!r}): depth must be 6n + 2 with n >= 1, such as 8, 20, 38, 74 or 110")
    if not isinstance(num_classes, int) or num_classes < 1:
        raise InputError(f"resnet(num_classes={num_classes!r}): num_classes must be a whole number from 1 up")
    return ResNet((depth - 2) // 6, num_classes)
