"""VGG networks with batch normalisation in their CIFAR forms (Liu et al., ICLR 2019, released code)."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from archsearch.errors import UsageError
from archsearch.models.initialisation import initialise
from archsearch.models.registry import MODELS

CHANNELS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """Five stages of 3x3 convolutions with max pooling between, global average pooling and a head.

    Args:
        convolutions: How many convolutions each of the five stages has.
        num_classes: Outputs.
        in_channels: Channels of the images.
        input_size: Height and width of the images in pixels. Below 16 the later poolings, which would find
            no 2x2 left, are not built.
        head: ``"linear"`` (one linear layer, as Network Slimming) or ``"hidden"`` (a linear layer of 512
            with batch normalisation in front of it, as Liu et al. use for L1-norm pruning).

    Raises:
        UsageError: If ``head`` is neither.
    """

    def __init__(
        self, convolutions: tuple[int, ...], num_classes: int, in_channels: int, input_size: int, head: str
    ) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        size = input_size
        for stage, (channels, count) in enumerate(zip(CHANNELS, convolutions, strict=True), start=1):
            if stage > 1 and size >= 2:
                layers[f"pool{stage - 1}"] = nn.MaxPool2d(2)
                size //= 2
            for i in range(1, count + 1):
                layers[f"conv{stage}_{i}"] = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
                layers[f"bn{stage}_{i}"] = nn.BatchNorm2d(channels)
                layers[f"relu{stage}_{i}"] = nn.ReLU()
                in_channels = channels
        self.features = nn.Sequential(layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head: nn.Module
        if head == "linear":
            self.head = nn.Linear(512, num_classes)
        elif head == "hidden":
            hidden = [nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU()]
            self.head = nn.Sequential(*hidden, nn.Linear(512, num_classes))
        else:
            raise UsageError(f"head is '{head}': it must be 'linear' or 'hidden'")
        initialise(self, norm_weight=0.5, linear_std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(N, in_channels, H, W)`` to logits ``(N, num_classes)``."""
        logits: Tensor = self.head(torch.flatten(self.pool(self.features(x)), 1))
        return logits


@MODELS.register("vgg11")
def vgg11(
    num_classes: int = 10, in_channels: int = 3, input_size: int = 32, head: str = "linear"
) -> nn.Module:
    """Build VGG-11 (configuration A of Simonyan and Zisserman)."""
    return VGG((1, 1, 2, 2, 2), num_classes, in_channels, input_size, head)


@MODELS.register("vgg13")
def vgg13(
    num_classes: int = 10, in_channels: int = 3, input_size: int = 32, head: str = "linear"
) -> nn.Module:
    """Build VGG-13 (configuration B)."""
    return VGG((2, 2, 2, 2, 2), num_classes, in_channels, input_size, head)


@MODELS.register("vgg16")
def vgg16(
    num_classes: int = 10, in_channels: int = 3, input_size: int = 32, head: str = "hidden"
) -> nn.Module:
    """Build VGG-16 (configuration D), with a hidden layer in the head as published for L1-norm pruning."""
    return VGG((2, 2, 3, 3, 3), num_classes, in_channels, input_size, head)


@MODELS.register("vgg19")
def vgg19(
    num_classes: int = 10, in_channels: int = 3, input_size: int = 32, head: str = "linear"
) -> nn.Module:
    """Build VGG-19 (configuration E), as published for Network Slimming."""
    return VGG((2, 2, 4, 4, 4), num_classes, in_channels, input_size, head)
