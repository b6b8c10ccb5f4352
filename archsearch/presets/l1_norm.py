"""Predefined widths of L1-norm pruning.

Li et al. (*Pruning Filters for Efficient ConvNets*, ICLR 2017, section 4) choose by hand which layers of a
network to prune, and how much in each stage; Liu et al. (ICLR 2019) train the same widths from scratch. A
layer with prune ratio ``p`` keeps ``int(C * (1 - p))`` channels. Wang et al. (*Why is the State of Neural
Network Pruning so Confusing?*, 2023, table 6) prune the same layers of ResNet-56 by one ratio.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from archsearch.presets.preset import Rule, register


def _basic_blocks(blocks: Sequence[int], skipped: Sequence[int], percents: Sequence[int]) -> Rule:
    """Prune the first convolution of basic blocks, so that the residual stream keeps its width.

    Args:
        blocks: Blocks of each stage.
        skipped: Convolutions that stay, counted as published: the stem is 1, 1x1 shortcuts do not count, so
            that a block's first convolution has an even number.
        percents: Share in percent that each stage's other first convolutions lose.
    """
    first_block = [sum(blocks[:stage]) for stage in range(len(blocks))]

    def width(name: str, size: int) -> int:
        match = re.fullmatch(r"layer(\d+)\.(\d+)\.conv1", name)
        if not match:
            return size
        stage, block = int(match[1]) - 1, int(match[2])
        number = 2 * (first_block[stage] + block + 1)
        return size if number in skipped else size * (100 - percents[stage]) // 100

    return width


def _halved(layers: Sequence[str]) -> Rule:
    return lambda name, size: size // 2 if name in layers else size


register(
    "vgg16-a",
    "vgg16",
    _halved([f"features.conv{c}" for c in ("1_1", "4_1", "4_2", "4_3", "5_1", "5_2", "5_3")]),
)

_RESNET34_SKIPPED = (2, 8, 14, 16, 26, 28, 30, 32)

for _name, _model, _blocks, _skipped, _percents in (
    ("resnet56-a", "resnet56", (9, 9, 9), (16, 20, 38, 54), (10, 10, 10)),
    ("resnet56-b", "resnet56", (9, 9, 9), (16, 18, 20, 34, 38, 54), (60, 30, 10)),
    ("resnet110-a", "resnet110", (18, 18, 18), (36,), (50, 0, 0)),
    ("resnet110-b", "resnet110", (18, 18, 18), (36, 38, 74), (50, 40, 30)),
    ("resnet34-a", "torchvision/resnet34", (3, 4, 6, 3), _RESNET34_SKIPPED, (30, 30, 30, 0)),
    ("resnet34-b", "torchvision/resnet34", (3, 4, 6, 3), _RESNET34_SKIPPED, (50, 60, 40, 0)),
):
    register(_name, _model, _basic_blocks(_blocks, _skipped, _percents))

for _kept in (70, 50, 30, 10):
    register(f"resnet56-uniform-{_kept}", "resnet56", _basic_blocks((9, 9, 9), (), (100 - _kept,) * 3))
