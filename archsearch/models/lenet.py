"""The LeNets (LeCun et al., 1998) in the sizes that pruning papers use."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archsearch.errors import UsageError
from archsearch.models.initialisation import initialise_alike
from archsearch.models.registry import MODELS


class LeNet300100(nn.Module):
    """Two hidden layers of 300 and 100 units on the flattened image; Gaussian Glorot weights."""

    def __init__(self, num_classes: int, in_channels: int, input_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_channels * input_size**2, 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc3 = nn.Linear(100, num_classes)
        initialise_alike(self, nn.init.xavier_normal_)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(N, in_channels, input_size, input_size)`` to logits ``(N, num_classes)``."""
        x = F.relu(self.fc1(torch.flatten(x, 1)))
        logits: Tensor = self.fc3(F.relu(self.fc2(x)))
        return logits


class LeNet5(nn.Module):
    """Two unpadded 5x5 convolutions of 20 and 50 channels, a hidden layer of 500 units, one linear layer.

    This is the form that Caffe's MNIST example made the reference of pruning papers: only the hidden layer
    is rectified, and weights are uniform in ``±sqrt(3 / fan_in)`` (Caffe's "xavier").

    Raises:
        UsageError: If the images are too small for two convolutions and two poolings.
    """

    def __init__(self, num_classes: int, in_channels: int, input_size: int) -> None:
        super().__init__()
        size = ((input_size - 4) // 2 - 4) // 2
        if size < 1:
            raise UsageError(f"lenet5 needs images of 16x16 or more, and input_size is {input_size}")
        self.conv1 = nn.Conv2d(in_channels, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(50 * size**2, 500)
        self.fc2 = nn.Linear(500, num_classes)
        initialise_alike(self, partial(nn.init.kaiming_uniform_, nonlinearity="linear"))

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(N, in_channels, input_size, input_size)`` to logits ``(N, num_classes)``."""
        x = F.max_pool2d(self.conv1(x), 2)
        x = F.max_pool2d(self.conv2(x), 2)
        x = F.relu(self.fc1(torch.flatten(x, 1)))
        logits: Tensor = self.fc2(x)
        return logits


@MODELS.register("lenet_300_100")
def lenet_300_100(num_classes: int = 10, in_channels: int = 1, input_size: int = 28) -> nn.Module:
    """Build LeNet-300-100."""
    return LeNet300100(num_classes, in_channels, input_size)


@MODELS.register("lenet5")
def lenet5(num_classes: int = 10, in_channels: int = 1, input_size: int = 28) -> nn.Module:
    """Build LeNet-5 in Caffe's form."""
    return LeNet5(num_classes, in_channels, input_size)
