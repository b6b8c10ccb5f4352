"""A network that a test trains in a second, as a user's own file brings it: ``tiny_net.py:tiny``."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class TinyNet(nn.Module):
    """Two convolutions with an initialisation of their own."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, num_classes)
        nn.init.kaiming_normal_(self.conv2.weight, mode="fan_out")
        nn.init.constant_(self.bn1.weight, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        logits: Tensor = self.fc(F.relu(self.bn2(self.conv2(x))).mean((2, 3)))
        return logits


def tiny(num_classes: int = 3, in_channels: int = 2) -> nn.Module:
    return TinyNet(num_classes, in_channels)


tiny.input_shape = (2, 6, 6)  # type: ignore[attr-defined]
