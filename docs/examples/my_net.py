"""A network of your own: any function that returns an ``nn.Module`` is a factory.

archsearch find --model docs/examples/my_net.py:my_net --trust-code --flops 0.5 --budget none
"""

import torch
from torch import Tensor, nn


class MyNet(nn.Module):
    """A stem, a residual block, a depthwise separable convolution and a classifier."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        )
        self.block = nn.Sequential(
            nn.Conv2d(16, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
        )
        self.depthwise = nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=16, bias=False)
        self.pointwise = nn.Sequential(nn.Conv2d(16, 48, 1, bias=False), nn.BatchNorm2d(48), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(48, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(N, in_channels, H, W)`` to logits ``(N, num_classes)``."""
        x = self.stem(x)
        x = torch.relu(x + self.block(x))
        x = self.pointwise(self.depthwise(x))
        return self.classifier(torch.flatten(self.pool(x), 1))


def my_net(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Build the network; archsearch passes those arguments that the signature names."""
    return MyNet(num_classes, in_channels)


my_net.input_shape = (3, 32, 32)  # optional; without it say --input-shape
