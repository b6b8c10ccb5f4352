"""Conv-2, Conv-4 and Conv-6: the small VGG-like networks of Frankle and Carbin (ICLR 2019, figure 2)."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archsearch.errors import UsageError
from archsearch.models.initialisation import initialise_alike
from archsearch.models.registry import MODELS


class ConvNet(nn.Module):
    """Pairs of 3x3 convolutions with max pooling after each pair, then two hidden layers of 256 units.

    No batch normalisation; Gaussian Glorot weights.

    Args:
        pairs: How many pairs: of 64, 128 and 256 channels.
        num_classes: Outputs.
        in_channels: Channels of the images.
        input_size: Height and width of the images in pixels.

    Raises:
        UsageError: If the images are too small for one pooling a pair.
    """

    def __init__(self, pairs: int, num_classes: int, in_channels: int, input_size: int) -> None:
        super().__init__()
        size = input_size // 2**pairs
        if size < 1:
            least = 2**pairs
            raise UsageError(
                f"conv{2 * pairs} needs images of {least}x{least} or more, and input_size is {input_size}"
            )
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for pair in range(1, pairs + 1):
            channels = 32 * 2**pair
            for i in (2 * pair - 1, 2 * pair):
                layers[f"conv{i}"] = nn.Conv2d(in_channels, channels, 3, padding=1)
                layers[f"relu{i}"] = nn.ReLU()
                in_channels = channels
            layers[f"pool{pair}"] = nn.MaxPool2d(2)
        self.features = nn.Sequential(layers)
        self.fc1 = nn.Linear(in_channels * size**2, 256)
        self.fc2 = nn.Linear(256, 256)
        self.fc3 = nn.Linear(256, num_classes)
        initialise_alike(self, nn.init.xavier_normal_)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(N, in_channels, input_size, input_size)`` to logits ``(N, num_classes)``."""
        x = torch.flatten(self.features(x), 1)
        logits: Tensor = self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))
        return logits


@MODELS.register("conv2")
def conv2(num_classes: int = 10, in_channels: int = 3, input_size: int = 32) -> nn.Module:
    """Build Conv-2."""
    return ConvNet(1, num_classes, in_channels, input_size)


@MODELS.register("conv4")
def conv4(num_classes: int = 10, in_channels: int = 3, input_size: int = 32) -> nn.Module:
    """Build Conv-4."""
    return ConvNet(2, num_classes, in_channels, input_size)


@MODELS.register("conv6")
def conv6(num_classes: int = 10, in_channels: int = 3, input_size: int = 32) -> nn.Module:
    """Build Conv-6."""
    return ConvNet(3, num_classes, in_channels, input_size)
