"""What the layers that read a group get from each of its units, on calibration images.

The *contribution* of a unit to one output value of a layer is the part of its sum that the unit's channels
bring. Greedy and LASSO selection need nothing of the contributions but their Gram matrix, ``(size, size)``:
what follows does not grow with the number of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import csr_array, hstack

from archsearch.graph import Units
from archsearch.pruners.pruner import Context
from archsearch.pruners.reading import Reading, Run, watch

Matrix: TypeAlias = npt.NDArray[np.float64]

AddUp: TypeAlias = Callable[[Reading, int, torch.Generator, csr_array], "tuple[Matrix, int]"]
"""Looks at a reading at so many random places, with the units of its channels, ``(C_in, U)``.

Returns the Gram matrix of the units' contributions, ``(U, U)``, and the number of samples.
"""


@dataclass(frozen=True)
class Gram:
    """Second moments of the contributions of a group's units.

    Attributes:
        matrix: Sum over samples of the products of two units' contributions, ``(size, size)``.
        output: Sum over samples of the squared outputs of the layer (without bias), to which other groups
            may contribute too.
        samples: How many samples.
    """

    matrix: Matrix
    output: float
    samples: int


Grams: TypeAlias = Mapping[str, Mapping[int, Gram]]
"""For each group, what each op that reads it gets, by the op's number."""


def one_filter_a_place(
    reading: Reading, places: int, draw: torch.Generator, units: csr_array
) -> tuple[Matrix, int]:
    """Add up over random pairs of a place and a filter (Luo et al., ICCV 2017, section 3.2.1)."""
    found = reading.places(places, draw)
    patches = reading.patches(found.repeat(-(-places // len(found)))[:places])
    groups, rows = reading.weight.shape[:2]
    filters = torch.randint(groups * rows, (places,), generator=draw)
    group, row = filters // rows, filters % rows
    sample = torch.arange(places)
    parts = torch.zeros(patches.shape[:3], dtype=patches.dtype, device=patches.device)
    parts[sample, group] = (patches[sample, group] * reading.weight[group, row]).sum(2)
    contributions = parts.flatten(1).cpu().numpy() @ units
    return contributions.T @ contributions, places


def all_filters(reading: Reading, places: int, draw: torch.Generator, units: csr_array) -> tuple[Matrix, int]:
    """Add up over every filter at random places (He et al., ICCV 2017, section 3.1)."""
    found = reading.places(places, draw)
    groups, rows, *_ = reading.weight.shape
    return gram_of_all_filters(reading.patches(found), reading.weight, units), len(found) * groups * rows


def gram_of_all_filters(patches: torch.Tensor, weight: torch.Tensor, units: csr_array) -> Matrix:
    """Return the Gram matrix of the contributions at all places to all filters, without forming any.

    Products are in single precision, as the network computes them, and sums in double: twice as fast.

    The contribution of channel ``c`` to filter ``o`` at place ``r`` is ``sum_k P[r,c,k] W[o,c,k]``. So the
    products of those of ``c`` and ``d``, summed over ``r`` and ``o``, are
    ``sum_kj (P_k' P_j)[c,d] (W_k' W_j)[c,d]``. Swapping ``k`` and ``j`` transposes a term: half of them do.

    Args:
        patches: ``P``, ``(R, groups, C_in / groups, K)``.
        weight: ``W``, ``(groups, C_out / groups, C_in / groups, K)``.
        units: ``(C_in, U)``.
    """
    size, kernel = weight.shape[2:]
    half = np.zeros((units.shape[1],) * 2)
    for group, own_weight in enumerate(weight):
        own_units = units[group * size : (group + 1) * size]
        p, w = (rows.permute(2, 1, 0).float().contiguous() for rows in (patches[:, group], own_weight))
        for start in range(0, size, 1024):  # bounds the memory
            part = slice(start, start + 1024)
            products = torch.zeros(len(p[0, part]), size, dtype=torch.float64, device=p.device)
            for k in range(kernel):
                for j in range(k + 1):
                    term = (p[k, part] @ p[j].T).mul_(w[k, part] @ w[j].T)
                    products.add_(term, alpha=0.5 if k == j else 1)
            half += own_units[part].T @ (products.cpu().numpy() @ own_units)
    return half + half.T


def contribution_grams(context: Context, images: int, places: int, add_up: AddUp) -> Grams:
    """Return for each group the Gram matrix of each op that reads it, by the op's number.

    Args:
        context: Model, graph and calibration batches.
        images: How many calibration images to look at, all in one batch.
        places: Places of each image.
        add_up: Over which samples: ``one_filter_a_place`` or ``all_filters``.
    """
    graph = context.graph
    grams: dict[str, dict[int, Gram]] = {name: {} for name in graph.groups}
    draw = torch.Generator().manual_seed(context.seed)
    batch = first_images(context, images)

    def see(reading: Reading, run: Run) -> torch.Tensor:
        groups = [graph.groups[name] for name in graph.groups_of(reading.units)]
        units = [membership(reading.units - group.first_unit, group.size) for group in groups]
        others = np.ones((len(reading.units), 1)) - sum(part.sum(1)[:, None] for part in units)
        every = hstack([*units, csr_array(others)], format="csr")
        matrix, samples = add_up(reading, places * len(batch), draw, every)
        output = max(float(matrix.sum()), 0.0)
        end = 0
        for group in groups:
            start, end = end, end + group.size
            grams[group.name][reading.number] = Gram(matrix[start:end, start:end], output, samples)
        return run()

    watch(context.model, graph, batch, see)
    return grams


def in_total(grams: Mapping[int, Gram]) -> Gram:
    """Add up the Gram matrices of all ops that read a group."""
    matrices = [gram.matrix for gram in grams.values()]
    output, samples = (
        sum(each) for each in zip(*((g.output, g.samples) for g in grams.values()), strict=True)
    )
    return Gram(np.sum(matrices, axis=0), output, samples)


def membership(units: Units, size: int) -> csr_array:
    """Return which of a group's units each channel belongs to, ``(C_in, size)`` of 0 and 1."""
    (mine,) = np.nonzero((units >= 0) & (units < size))
    return csr_array((np.ones(len(mine)), (mine, units[mine])), shape=(len(units), size))


def first_images(context: Context, images: int) -> torch.Tensor:
    """Return the first ``images`` calibration images in one batch."""
    found, left = [], images
    for batch, _ in context.calibration():
        found.append(batch[:left])
        left -= len(batch)
        if left <= 0:
            break
    return torch.cat(found)
