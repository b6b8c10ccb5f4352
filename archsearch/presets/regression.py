"""Predefined widths of regression-based channel pruning.

He et al. (*Channel Pruning for Accelerating Very Deep Neural Networks*, ICCV 2017) make VGG-16 five times as
fast; the widths are those of their released network, as Liu et al. (ICLR 2019) train it from scratch.
"""

from __future__ import annotations

from archsearch.presets.preset import listed, register
from archsearch.presets.vgg import TORCHVISION_VGG16

register(
    "vgg-5x",
    "torchvision/vgg16",
    listed(TORCHVISION_VGG16, (24, 22, 41, 51, 108, 89, 111, 184, 276, 228, 512, 512, 512)),
)
