"""Widths that Network Slimming found (Liu et al., ICCV 2017), where somebody has published them."""

from __future__ import annotations

from archsearch.presets.preset import listed, register
from archsearch.presets.vgg import ZOO_VGG19

# 30 % of all channels stay above one global threshold, on CIFAR-10; printed by foolwood/pytorch-slimming.
register(
    "vgg19-slimming",
    "vgg19",
    listed(ZOO_VGG19, (49, 64, 128, 128, 256, 254, 234, 198, 114, 41, 24, 11, 14, 13, 19, 104)),
)
