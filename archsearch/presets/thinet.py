"""Predefined widths of ThiNet.

Luo et al. (*ThiNet*, ICCV 2017, section 4) halve the first ten convolutions of VGG-16, and keep .3, .5 or .7
of the two inner layers of each bottleneck of ResNet-50, whose residual stream stays.
"""

from __future__ import annotations

import re

from archsearch.presets.preset import Rule, listed, register
from archsearch.presets.vgg import TORCHVISION_VGG16

register(
    "thinet-conv",
    "torchvision/vgg16",
    listed(TORCHVISION_VGG16[:10], (32, 32, 64, 64, 128, 128, 128, 256, 256, 256)),
)


def _bottlenecks(percent: int) -> Rule:
    """Keep this share, in percent, of the outputs of the 1x1 and the 3x3 convolution of each bottleneck."""

    def width(name: str, size: int) -> int:
        inner = re.fullmatch(r"layer\d+\.\d+\.conv[12]", name)
        return size * percent // 100 if inner else size

    return width


for _percent in (30, 50, 70):
    register(f"thinet-{_percent}", "torchvision/resnet50", _bottlenecks(_percent))
