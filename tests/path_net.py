"""A small network with convolutions of every kind of groups, which tests also name as ``FILE:paths``."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class PathNet(nn.Module):
    """A residual block of 4 paths as in ResNeXt, then a depthwise convolution.

    A path is 3 channels of ``reduce``, a group of ``paths`` with 3 outputs, and 3 columns of ``expand``.
    """

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 8, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(8)
        self.reduce = nn.Conv2d(8, 12, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(12)
        self.paths = nn.Conv2d(12, 12, 3, padding=1, groups=4, bias=False)
        self.bn2 = nn.BatchNorm2d(12)
        self.expand = nn.Conv2d(12, 8, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8, bias=False)
        self.bn4 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.stem(x)))
        y = F.relu(self.bn2(self.paths(F.relu(self.bn1(self.reduce(x))))))
        x = F.relu(x + self.bn3(self.expand(y)))
        logits: Tensor = self.fc(F.relu(self.bn4(self.depthwise(x))).mean((2, 3)))
        return logits


def paths(num_classes: int = 3, in_channels: int = 2) -> nn.Module:
    return PathNet(num_classes, in_channels)


paths.input_shape = (2, 6, 6)  # type: ignore[attr-defined]
