"""Widths that a search found, where somebody has published them."""

from __future__ import annotations

from archsearch.presets.preset import listed, register

# He et al., AMC (ECCV 2018): half of the FLOPs on ImageNet, printed by mit-han-lab/amc as the inputs of each
# layer; a depthwise convolution has the width of what it reads.
register(
    "mobilenet_v1-amc",
    "mobilenet_v1",
    listed(
        ("conv1", *(f"blocks.{number}.conv2" for number in range(13))),
        (24, 48, 96, 80, 192, 200, 328, 352, 368, 360, 328, 400, 736, 752),
    ),
)
