"""What the layers that read a group get from each of its units, on calibration images.

The *contribution* of a unit to one output value of a layer is the part of its sum that the unit's channels
bring. Greedy and LASSO selection need nothing of the contributions but their Gram matrix, ``(size, size)``,
summed up batch by batch: memory and later work do not grow with the number of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import csr_array

from archsearch.graph import STAYS, ChannelGraph, Units
from archsearch.pruners.pruner import Context
from archsearch.pruners.reading import Reading, Run, watch

Matrix: TypeAlias = npt.NDArray[np.float64]

ChannelSum: TypeAlias = Callable[[csr_array], Matrix]
"""Turns the units of channels, ``(C_in, size)``, into the Gram matrix of the units, ``(size, size)``."""

AddUp: TypeAlias = Callable[[Reading, int, torch.Generator], "tuple[ChannelSum, int]"]
"""Looks at about so many samples of a reading; returns their sum, and how many they were."""


@dataclass
class Gram:
    """Second moments of the contributions of a group's units.

    Attributes:
        matrix: Sum over samples of the products of two units' contributions, ``(size, size)``.
        samples: How many samples.
    """

    matrix: Matrix
    samples: int = 0


def one_filter_a_sample(reading: Reading, samples: int, draw: torch.Generator) -> tuple[ChannelSum, int]:
    """Sum over random pairs of a place and a filter (Luo et al., ICCV 2017, section 3.2.1)."""
    places = reading.places(samples, draw)
    patches = reading.patches(places.repeat(-(-samples // len(places)))[:samples])
    groups, rows = reading.weight.shape[:2]
    filters = torch.randint(groups * rows, (samples,), generator=draw)
    group, row = filters // rows, filters % rows
    sample = torch.arange(samples)
    parts = torch.zeros(patches.shape[:3], dtype=patches.dtype, device=patches.device)
    parts[sample, group] = (patches[sample, group] * reading.weight[group, row]).sum(2)
    channels = parts.flatten(1).cpu().numpy()  # (samples, C_in)

    def gram(units: csr_array) -> Matrix:
        contributions = channels @ units
        return np.asarray(contributions.T @ contributions)

    return gram, samples


def all_filters(reading: Reading, samples: int, draw: torch.Generator) -> tuple[ChannelSum, int]:
    """Sum over every filter at random places (He et al., ICCV 2017, section 3.1).

    The contribution of channel ``c`` to filter ``o`` at place ``r`` is ``sum_k P[r,ck] W[o,ck]``. So the
    products of those of ``c`` and ``d``, summed over all ``r`` and ``o``, are the sum over ``k`` and ``l`` of
    ``(P'P)[ck,dl] (W'W)[ck,dl]``: no contribution is ever formed.
    """
    places = reading.places(samples, draw)
    patches = reading.patches(places).transpose(0, 1)  # (groups, R, C, K)
    weight = reading.weight
    groups, rows, size, kernel = weight.shape
    by_group = []
    for group in range(groups):
        p, w = patches[group].flatten(1), weight[group].flatten(1)
        by_group.append(
            torch.cat(  # a few channels at a time bound the memory
                [
                    ((p[:, part].T @ p) * (w[:, part].T @ w)).reshape(-1, kernel, size, kernel).sum((1, 3))
                    for part in torch.arange(size * kernel).split(kernel * max(1, 1024 // kernel))
                ]
            ).cpu()
        )
    channels = torch.block_diag(*by_group).numpy()

    def gram(units: csr_array) -> Matrix:
        return np.asarray(units.T @ (channels @ units))

    return gram, len(places) * rows * groups


def contribution_grams(
    context: Context, images: int, places: int, add_up: AddUp
) -> dict[str, dict[int, Gram]]:
    """Return for each group the Gram matrix of each op that reads it, by the op's number.

    Args:
        context: Model, graph and calibration batches.
        images: How many calibration images to look at.
        places: Places of each image.
        add_up: Over which samples: ``one_filter_a_sample`` or ``all_filters``.
    """
    graph = context.graph
    grams: dict[str, dict[int, Gram]] = {name: {} for name in graph.groups}
    draw = torch.Generator().manual_seed(context.seed)
    for batch in first_images(context, images):

        def see(reading: Reading, run: Run, samples: int = places * len(batch)) -> torch.Tensor:
            gram, count = add_up(reading, samples, draw)
            for name in groups_of(graph, reading.units):
                group = graph.groups[name]
                sums = grams[name].setdefault(reading.number, Gram(np.zeros((group.size, group.size))))
                sums.matrix += gram(membership(reading.units - group.first_unit, group.size))
                sums.samples += count
            return run()

        watch(context.model, graph, batch, see)
    return grams


def in_total(grams: dict[int, Gram]) -> Gram:
    """Add up the Gram matrices of all ops that read a group."""
    matrices = [gram.matrix for gram in grams.values()]
    return Gram(np.sum(matrices, axis=0), sum(gram.samples for gram in grams.values()))


def membership(units: Units, size: int) -> csr_array:
    """Return which of a group's units each channel belongs to, ``(C_in, size)`` of 0 and 1."""
    (mine,) = np.nonzero((units >= 0) & (units < size))
    return csr_array((np.ones(len(mine)), (mine, units[mine])), shape=(len(units), size))


def first_images(context: Context, images: int) -> Iterator[torch.Tensor]:
    """Return batches of the first ``images`` calibration images."""
    left = images
    for batch, _ in context.calibration():
        yield batch[:left]
        left -= len(batch)
        if left <= 0:
            return


def groups_of(graph: ChannelGraph, units: Units) -> list[str]:
    """Return the groups that some units belong to."""
    return list(dict.fromkeys(graph.group_of_unit[unit] for unit in np.unique(units) if unit != STAYS))
