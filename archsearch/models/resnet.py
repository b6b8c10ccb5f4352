"""Residual networks in their CIFAR form (He et al., CVPR 2016, section 4.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archsearch.errors import UsageError
from archsearch.models.initialisation import initialise
from archsearch.models.registry import MODELS


class ZeroPadShortcut(nn.Module):
    """Step over pixels and fill the new channels with zeros, half in front and half behind.

    This is option A of He et al.: it has no parameters. The amounts of padding are fixed when the block is
    built, so the shortcut stays right when its input has fewer channels than ``in_channels``.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.front = (out_channels - in_channels) // 2
        self.back = out_channels - in_channels - self.front

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, front + C + back, ceil(H / stride), ceil(W / stride))``."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.front, self.back))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module
        if in_channels == out_channels and stride == 1:
            self.shortcut = nn.Identity()
        elif shortcut == "pad":
            self.shortcut = ZeroPadShortcut(in_channels, out_channels, stride)
        else:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, out_channels, ceil(H / stride), ceil(W / stride))``."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """A 3x3 stem, three stages of 16, 32 and 64 channels, global average pooling and one linear layer.

    Args:
        depth: Layers with weights, ``6n + 2`` for ``n`` blocks a stage.
        num_classes: Outputs.
        in_channels: Channels of the images.
        shortcut: ``"pad"`` (option A, no parameters) or ``"projection"`` (option B, 1x1 convolution).

    Raises:
        UsageError: If ``shortcut`` is neither.
    """

    def __init__(self, depth: int, num_classes: int, in_channels: int, shortcut: str) -> None:
        super().__init__()
        if shortcut not in ("pad", "projection"):
            raise UsageError(f"shortcut is '{shortcut}': it must be 'pad' or 'projection'")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1, shortcut)
        self.layer2 = self._stage(16, 32, blocks, 2, shortcut)
        self.layer3 = self._stage(32, 64, blocks, 2, shortcut)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        initialise(self)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, blocks: int, stride: int, shortcut: str) -> nn.Sequential:
        first = BasicBlock(in_channels, out_channels, stride, shortcut)
        rest = (BasicBlock(out_channels, out_channels, 1, shortcut) for _ in range(blocks - 1))
        return nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(N, in_channels, H, W)`` to logits ``(N, num_classes)``."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(torch.flatten(self.pool(x), 1))
        return logits


@MODELS.register("resnet20")
def resnet20(num_classes: int = 10, in_channels: int = 3, shortcut: str = "pad") -> nn.Module:
    """Build ResNet-20."""
    return ResNet(20, num_classes, in_channels, shortcut)


@MODELS.register("resnet32")
def resnet32(num_classes: int = 10, in_channels: int = 3, shortcut: str = "pad") -> nn.Module:
    """Build ResNet-32."""
    return ResNet(32, num_classes, in_channels, shortcut)


@MODELS.register("resnet44")
def resnet44(num_classes: int = 10, in_channels: int = 3, shortcut: str = "pad") -> nn.Module:
    """Build ResNet-44."""
    return ResNet(44, num_classes, in_channels, shortcut)


@MODELS.register("resnet56")
def resnet56(num_classes: int = 10, in_channels: int = 3, shortcut: str = "pad") -> nn.Module:
    """Build ResNet-56."""
    return ResNet(56, num_classes, in_channels, shortcut)


@MODELS.register("resnet110")
def resnet110(num_classes: int = 10, in_channels: int = 3, shortcut: str = "pad") -> nn.Module:
    """Build ResNet-110."""
    return ResNet(110, num_classes, in_channels, shortcut)
