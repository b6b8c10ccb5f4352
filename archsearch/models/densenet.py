"""Densely connected networks for CIFAR with growth rate 12 (Huang et al., CVPR 2017)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archsearch.models.initialisation import initialise
from archsearch.models.registry import MODELS

GROWTH = 12


class DenseLayer(nn.Module):
    """Convolve everything so far into ``GROWTH`` new channels and append them."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, GROWTH, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, C + GROWTH, H, W)``."""
        return torch.cat([x, self.conv1(F.relu(self.bn1(x)))], dim=1)


class DenseBottleneck(nn.Module):
    """A dense layer with a 1x1 convolution to ``4 * GROWTH`` channels in front (DenseNet-B)."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, 4 * GROWTH, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * GROWTH)
        self.conv2 = nn.Conv2d(4 * GROWTH, GROWTH, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, C + GROWTH, H, W)``."""
        y = self.conv1(F.relu(self.bn1(x)))
        return torch.cat([x, self.conv2(F.relu(self.bn2(y)))], dim=1)


class Transition(nn.Module):
    """Mix the channels by a 1x1 convolution and halve the map."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, out_channels, H // 2, W // 2)``."""
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class DenseNet(nn.Module):
    """A 3x3 stem of ``2 * GROWTH`` channels, three dense blocks with transitions between, one linear layer.

    Args:
        layers: Dense layers in each of the three blocks.
        layer: ``DenseLayer`` or ``DenseBottleneck``.
        compression: Divides the channels at each transition; 1 keeps them.
        num_classes: Outputs.
        in_channels: Channels of the images.
    """

    def __init__(
        self,
        layers: int,
        layer: type[DenseLayer | DenseBottleneck],
        compression: int,
        num_classes: int,
        in_channels: int,
    ) -> None:
        super().__init__()
        channels = 2 * GROWTH
        stages: list[nn.Module] = [nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)]
        for block in range(3):
            if block:
                stages.append(Transition(channels, channels // compression))
                channels //= compression
            stages.append(nn.Sequential(*(layer(channels + i * GROWTH) for i in range(layers))))
            channels += layers * GROWTH
        self.conv1, self.block1, self.trans1, self.block2, self.trans2, self.block3 = stages
        self.bn = nn.BatchNorm2d(channels)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        initialise(self, norm_weight=0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(N, in_channels, H, W)`` to logits ``(N, num_classes)``."""
        x = self.trans1(self.block1(self.conv1(x)))
        x = self.block3(self.trans2(self.block2(x)))
        x = self.pool(F.relu(self.bn(x)))
        logits: Tensor = self.fc(torch.flatten(x, 1))
        return logits


@MODELS.register("densenet40")
def densenet40(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Build DenseNet-40 with growth rate 12, without bottlenecks or compression."""
    return DenseNet(12, DenseLayer, 1, num_classes, in_channels)


@MODELS.register("densenet_bc100")
def densenet_bc100(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Build DenseNet-BC-100 with growth rate 12: bottlenecks, and channels halved between blocks."""
    return DenseNet(16, DenseBottleneck, 2, num_classes, in_channels)
