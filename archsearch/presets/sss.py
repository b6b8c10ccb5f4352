"""Depths that Sparse Structure Selection found (Huang and Wang, ECCV 2018).

They are printed as the number of residual blocks that each stage of a ResNet-50 keeps, and whether the first
block is among them; the others of a stage are alike. Of a block that goes the shortcut is left.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from archsearch.presets.preset import Rule, register


def _blocks(stages: Sequence[tuple[int, bool]]) -> Rule:
    """Drop whole bottlenecks.

    Args:
        stages: Of each stage how many blocks are kept, and whether the first one is.
    """

    def width(name: str, size: int) -> int:
        match = re.fullmatch(r"layer(\d+)\.(\d+)\.conv[12]", name)
        if not match:
            return size
        block, (kept, first) = int(match[2]), stages[int(match[1]) - 1]
        stays = first if block == 0 else block <= kept - first
        return size if stays else 0

    return width


# Printed by Liu et al. (ICLR 2019, released code); the number is that of the layers that are left.
for _depth, _stages in (
    (41, ((0, False), (4, True), (6, True), (3, True))),
    (32, ((1, False), (4, True), (4, True), (1, True))),
    (26, ((0, False), (2, False), (5, False), (1, True))),
):
    register(f"resnet{_depth}-sss", "torchvision/resnet50", _blocks(_stages))
