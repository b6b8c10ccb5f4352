"""The published ways to draw fresh weights, shared by the families."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


def initialise(model: nn.Module, norm_weight: float = 1.0, linear_std: float | None = None) -> None:
    """Draw fresh weights in place, as Liu et al. (ICLR 2019, released code) do for CIFAR.

    Convolutions are normal with deviation ``sqrt(2 / (k * k * out_channels))`` (He et al., ICCV 2015,
    section 2.2, backward case); all biases are zero.

    Args:
        model: The network; every convolution, 2d normalisation and linear layer in it is visited.
        norm_weight: The scale that 2d normalisations start from; 1d ones keep PyTorch's 1.
        linear_std: The deviation of linear weights; ``None`` leaves linear layers as PyTorch draws them.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, norm_weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and linear_std is not None:
            nn.init.normal_(module.weight, std=linear_std)
            nn.init.zeros_(module.bias)


def initialise_alike(model: nn.Module, draw: Callable[[Tensor], object]) -> None:
    """Draw every convolution and linear layer by one rule, in place; all biases are zero.

    Args:
        model: The network.
        draw: A function of ``torch.nn.init`` that fills a weight.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            draw(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
