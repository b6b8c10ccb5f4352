"""Published predefined widths, by name.

Li et al. (*Pruning Filters for Efficient ConvNets*, ICLR 2017) choose by hand which layers of a network to
prune, and how much in each stage; Liu et al. (ICLR 2019) train the same widths from scratch. A layer with
prune ratio ``p`` keeps ``int(C * (1 - p))`` channels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from archsearch.errors import UsageError
from archsearch.registry import Registry

Rule: TypeAlias = Callable[[str, int], int]
"""From the name and the size of a group to its width."""


@dataclass(frozen=True)
class Preset:
    """Widths for one model.

    Attributes:
        name: What they are called.
        model: The model that they are for.
        rule: From a group's name and size to its width.
    """

    name: str
    model: str
    rule: Rule

    def widths(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Return the width of each group."""
        return {name: self.rule(name, size) for name, size in sizes.items()}

    def check_model(self, model: str) -> None:
        """Raise UsageError if the preset is for another model."""
        if model != self.model:
            raise UsageError(
                f"--preset {self.name} is for --model {self.model}, not {model}: leave out --model"
            )


PRESETS: Registry[Preset] = Registry("preset")


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


_RESNET34_SKIPPED = (2, 8, 14, 16, 26, 28, 30, 32)

for _preset in (
    Preset(
        "vgg16-a",
        "vgg16",
        _halved([f"features.conv{c}" for c in ("1_1", "4_1", "4_2", "4_3", "5_1", "5_2", "5_3")]),
    ),
    Preset("resnet56-a", "resnet56", _basic_blocks((9, 9, 9), (16, 20, 38, 54), (10, 10, 10))),
    Preset("resnet56-b", "resnet56", _basic_blocks((9, 9, 9), (16, 18, 20, 34, 38, 54), (60, 30, 10))),
    Preset("resnet110-a", "resnet110", _basic_blocks((18, 18, 18), (36,), (50, 0, 0))),
    Preset("resnet110-b", "resnet110", _basic_blocks((18, 18, 18), (36, 38, 74), (50, 40, 30))),
    Preset(
        "resnet34-a", "torchvision/resnet34", _basic_blocks((3, 4, 6, 3), _RESNET34_SKIPPED, (30, 30, 30, 0))
    ),
    Preset(
        "resnet34-b", "torchvision/resnet34", _basic_blocks((3, 4, 6, 3), _RESNET34_SKIPPED, (50, 60, 40, 0))
    ),
):
    PRESETS.register(_preset.name)(_preset)
