"""MobileNets for 32x32 images: the published layers, with the first strides of 2 left out.

Version 1 (Howard et al., 2017, table 1) loses the stride of its stem; version 2 (Sandler et al., CVPR 2018,
table 2) that of its stem and of its first 24-channel block, so that the last maps are 2x2 and 4x4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archsearch.models.initialisation import initialise
from archsearch.models.registry import MODELS


class SeparableConv(nn.Module):
    """A depthwise 3x3 convolution and a 1x1 convolution, each normalised and rectified."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(
            in_channels, in_channels, 3, stride=stride, padding=1, groups=in_channels, bias=False
        )
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, out_channels, ceil(H / stride), ceil(W / stride))``."""
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)))


class MobileNetV1(nn.Module):
    """A 3x3 stem, thirteen separable convolutions, global average pooling and one linear layer."""

    # (output channels, stride) of each separable convolution
    LAYERS = (
        *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
        *((512, 1),) * 5,
        *((1024, 2), (1024, 1)),
    )

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        channels, blocks = 32, []
        for out_channels, stride in self.LAYERS:
            blocks.append(SeparableConv(channels, out_channels, stride))
            channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(N, in_channels, H, W)`` to logits ``(N, num_classes)``."""
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        logits: Tensor = self.fc(torch.flatten(self.pool(x), 1))
        return logits


class InvertedResidual(nn.Module):
    """Expand by a 1x1 convolution, filter depthwise, project back; add the input where shapes agree."""

    def __init__(self, in_channels: int, out_channels: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.expand: nn.Module = nn.Identity()
        if expansion != 1:
            self.expand = nn.Sequential(
                nn.Conv2d(in_channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()
            )
        self.conv1 = nn.Conv2d(hidden, hidden, 3, stride=stride, padding=1, groups=hidden, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, out_channels, ceil(H / stride), ceil(W / stride))``."""
        y = F.relu6(self.bn1(self.conv1(self.expand(x))))
        y = self.bn2(self.conv2(y))
        out: Tensor = x + y if self.residual else y
        return out


class MobileNetV2(nn.Module):
    """A 3x3 stem, seventeen inverted residuals, a 1x1 convolution, pooling and one linear layer."""

    # (expansion, output channels, repeats, stride of the first)
    STAGES = (
        *((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2)),
        *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
    )

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        channels, blocks = 32, []
        for expansion, out_channels, repeats, stride in self.STAGES:
            for i in range(repeats):
                blocks.append(InvertedResidual(channels, out_channels, expansion, stride if i == 0 else 1))
                channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.conv2 = nn.Conv2d(channels, 1280, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1280)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(1280, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(N, in_channels, H, W)`` to logits ``(N, num_classes)``."""
        x = self.blocks(F.relu6(self.bn1(self.conv1(x))))
        x = self.pool(F.relu6(self.bn2(self.conv2(x))))
        logits: Tensor = self.fc(torch.flatten(x, 1))
        return logits


@MODELS.register("mobilenet_v1")
def mobilenet_v1(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Build MobileNet v1 at full width."""
    return MobileNetV1(num_classes, in_channels)


@MODELS.register("mobilenet_v2")
def mobilenet_v2(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Build MobileNet v2 at full width."""
    return MobileNetV2(num_classes, in_channels)
