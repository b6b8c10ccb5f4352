"""CHIP: a channel is worth what the nuclear norm of a layer's feature maps loses without its map."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from archsearch.errors import UsageError
from archsearch.graph import Units
from archsearch.pruners.features import UnitMeans, watch_features
from archsearch.pruners.pruner import PRUNERS, Context, Need, Scores

_AT_ONCE = 2**24  # numbers in one array, which bounds the memory
_NODES = 128
_LOG_T = (-27.0, 25.0)  # around the largest singular value: what lies beyond adds less than 1e-10 of it


def independence(maps: torch.Tensor) -> torch.Tensor:
    """Return the channel independence of each feature map, ``(N, C, H, W) -> (N, C)``.

    That is ``|A|_* - |A without row c|_*`` with the nuclear norm, ``A`` being an image's maps as
    ``(C, H W)``. Instead of a decomposition for each row, one does for all. The square root is an integral of
    logarithms, and without a row ``a`` a determinant changes by a factor, so that the difference is::

        -1/pi * integral over t > 0 of log(1 - a' (A'A + t^2)^-1 a) dt

    In ``log t`` the trapezoidal rule is exact to about 1e-10 of the largest singular value; what comes from
    squares of singular values, to about 1e-7.
    """
    matrices = maps.flatten(2)
    channels, pixels = matrices.shape[1:]
    images = max(1, _AT_ONCE // (max(channels, pixels) * max(_NODES, min(channels, pixels))))
    return torch.cat([_independence(part.double()) for part in matrices.split(images)])


def _independence(matrices: torch.Tensor) -> torch.Tensor:
    """Return the same for matrices in float64, ``(N, C, P) -> (N, C)``."""
    by_pixels = matrices.shape[2] < matrices.shape[1]
    gram = matrices.mT @ matrices if by_pixels else matrices @ matrices.mT
    squares, vectors = torch.linalg.eigh(gram)  # squared singular values, (N, n)
    largest = squares[:, -1:]
    squares = squares * (squares > gram.shape[1] * torch.finfo(squares.dtype).eps * largest)
    if by_pixels:
        real = (squares > 0)[:, None]
        shares = torch.where(real, (matrices @ vectors) ** 2 / squares[:, None], 0.0)
        beyond = (1 - shares.sum(2, keepdim=True)).clamp_min(0)  # of each row, outside of these
    else:
        shares = vectors**2  # of each row in each singular vector, (N, C, n)
        beyond = shares.new_zeros(())
    logs = torch.linspace(*_LOG_T, _NODES, dtype=squares.dtype, device=squares.device)
    scale = torch.where(largest > 0, largest, 1.0).sqrt()
    t = scale * logs.exp()  # (N, nodes)
    sums = squares[:, :, None] + t[:, None] ** 2
    goes = shares @ (squares[:, :, None] / sums)  # a' (A'A + t^2)^-1 a, (N, C, nodes)
    stays = beyond + shares @ (t[:, None] ** 2 / sums)  # one less that, without cancellation
    values = torch.where(goes < 0.5, torch.log1p(-goes.clamp_max(0.5)), stays.log())
    step = (_LOG_T[1] - _LOG_T[0]) / (_NODES - 1)
    return -(values @ t[:, :, None])[..., 0] * step / math.pi


@PRUNERS.register("chip")
@dataclass(frozen=True)
class ChannelIndependence:
    """Keep the channels whose feature maps the other channels of their layer make up for least.

    Args:
        images: Calibration images.
    """

    images: int = 640

    source: ClassVar[str] = (
        "Sui et al., CHIP: CHannel Independence-based Pruning for Compact Neural Networks, NeurIPS 2021, "
        "the change of the nuclear norm"
    )
    allocation: ClassVar[str] = "local"
    needs: ClassVar[tuple[Need, ...]] = ("images",)

    def __post_init__(self) -> None:
        if self.images < 1:
            raise UsageError(f"chip: images is {self.images}: it must be 1 or more")

    def score(self, context: Context) -> Scores:
        """Return the mean independence of each unit's feature maps; a group without any stays as it is."""
        means = UnitMeans(context.graph)

        def see(maps: torch.Tensor, units: Units) -> None:
            means.add(independence(maps), units)

        watch_features(context, self.images, see)
        return means.scores()
