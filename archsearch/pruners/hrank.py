"""HRank: a channel is worth the rank of its feature maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from archsearch.errors import UsageError
from archsearch.graph import Units
from archsearch.pruners.features import UnitMeans, watch_features
from archsearch.pruners.pruner import PRUNERS, Context, Need, Scores

_AT_ONCE = 4096  # maps in one call, which bounds the memory


def map_ranks(maps: torch.Tensor) -> torch.Tensor:
    """Return the rank of each feature map, ``(N, C, H, W) -> (N, C)``.

    Singular values count from the largest one times the machine's precision times the longer side.
    """
    rows = maps.flatten(0, 1)
    if min(maps.shape[2:]) == 1:
        ranks = rows.flatten(1).any(1)
    else:
        ranks = torch.cat([torch.linalg.matrix_rank(part) for part in rows.split(_AT_ONCE)])
    return ranks.reshape(maps.shape[:2]).long()


@PRUNERS.register("hrank")
@dataclass(frozen=True)
class HRank:
    """Keep the channels whose feature maps have the highest rank.

    Args:
        images: Calibration images.
    """

    images: int = 500

    source: ClassVar[str] = (
        "Lin et al., HRank: Filter Pruning using High-Rank Feature Map, CVPR 2020, section 3.2"
    )
    allocation: ClassVar[str] = "local"
    needs: ClassVar[tuple[Need, ...]] = ("images",)

    def __post_init__(self) -> None:
        if self.images < 1:
            raise UsageError(f"hrank: images is {self.images}: it must be 1 or more")

    def score(self, context: Context) -> Scores:
        """Return the mean rank of each unit's feature maps; a group without any stays as it is."""
        means = UnitMeans(context.graph)

        def see(maps: torch.Tensor, units: Units) -> None:
            means.add(map_ranks(maps.float()), units)

        watch_features(context, self.images, see)
        return means.scores()
