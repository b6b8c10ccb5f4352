"""Fresh weights for a network of which only some weights stay."""

from __future__ import annotations

import math

import torch
from torch import nn

from archsearch.sparsity.masks import Masks


def initialise(model: nn.Module, masks: Masks) -> nn.Module:
    """Draw the masked weights of a fresh network for what is kept of them, and apply the masks, in place.

    Convolutions get ``N(0, sqrt(2 / n))`` with ``n = kept weights / input channels`` (Liu et al., ICLR 2019,
    released code for weight-level pruning): the initialisation of the dense layer there, which divides by
    ``k * k * output channels``, for the connections that are left. Other layers keep the weights that they
    have, divided by the square root of the kept share: their own initialisation with the kept fan-in.

    The global random state decides the weights. All other parameters stay as they are.
    """
    convolutions = {
        id(module.weight): module.in_channels
        for module in model.modules()
        if isinstance(module, nn.modules.conv._ConvNd)
    }
    parameters, shares = dict(model.named_parameters()), masks.shares
    masks.check(model)
    with torch.no_grad():
        for name, mask in masks.items():
            parameter = parameters[name]
            if id(parameter) in convolutions:
                parameter.normal_(0, kept_deviation(int(mask.sum()), convolutions[id(parameter)]))
            else:
                parameter.div_(math.sqrt(shares[name]))
    return masks.apply(model)


def kept_deviation(kept: int, in_channels: int) -> float:
    """Return the standard deviation of a convolution's fresh weights, ``sqrt(2 C_in / kept)``."""
    return math.sqrt(2 * in_channels / kept)
