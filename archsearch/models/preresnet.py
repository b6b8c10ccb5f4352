"""Pre-activation bottleneck networks for CIFAR (He et al., ECCV 2016), as Network Slimming prunes them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archsearch.models.initialisation import initialise
from archsearch.models.registry import MODELS

EXPANSION = 4


class PreActBottleneck(nn.Module):
    """Normalise, rectify and convolve three times (1x1, 3x3, 1x1) beside a shortcut of the raw input."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = channels * EXPANSION
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels or stride != 1:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, 4 * channels, ceil(H / stride), ceil(W / stride))``."""
        y = self.conv1(F.relu(self.bn1(x)))
        y = self.conv2(F.relu(self.bn2(y)))
        y = self.conv3(F.relu(self.bn3(y)))
        out: Tensor = y + self.shortcut(x)
        return out


class PreResNet(nn.Module):
    """A 3x3 stem, three stages of bottlenecks, a last normalisation, pooling and one linear layer.

    Args:
        depth: Layers with weights, ``9n + 2`` for ``n`` blocks a stage.
        num_classes: Outputs.
        in_channels: Channels of the images.
    """

    def __init__(self, depth: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 9
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(64, 32, blocks, 2)
        self.layer3 = self._stage(128, 64, blocks, 2)
        self.bn = nn.BatchNorm2d(256)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(256, num_classes)
        initialise(self, norm_weight=0.5)

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = PreActBottleneck(in_channels, channels, stride)
        rest = (PreActBottleneck(channels * EXPANSION, channels, 1) for _ in range(blocks - 1))
        return nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(N, in_channels, H, W)`` to logits ``(N, num_classes)``."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        x = self.pool(F.relu(self.bn(x)))
        logits: Tensor = self.fc(torch.flatten(x, 1))
        return logits


@MODELS.register("preresnet56")
def preresnet56(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Build PreResNet-56."""
    return PreResNet(56, num_classes, in_channels)


@MODELS.register("preresnet110")
def preresnet110(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Build PreResNet-110."""
    return PreResNet(110, num_classes, in_channels)


@MODELS.register("preresnet164")
def preresnet164(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Build PreResNet-164."""
    return PreResNet(164, num_classes, in_channels)
