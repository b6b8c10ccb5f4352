"""The convolutions of the VGG networks that presets are for, in order."""

from __future__ import annotations

from typing import Final

TORCHVISION_VGG16: Final = tuple(f"features.{n}" for n in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28))
ZOO_VGG19: Final = tuple(
    f"features.conv{stage}_{number}"
    for stage, count in enumerate((2, 2, 4, 4, 4), start=1)
    for number in range(1, count + 1)
)
