"""Which cells to measure: a grid of channels for each signature, as fine as a number of cells allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np
import numpy.typing as npt

from archsearch.latency.cells import Form, Layer, Signature
from archsearch.latency.content import Axes
from archsearch.latency.predict import axes_of, stepped
from archsearch.latency.quantum import Stairs

Integers = npt.NDArray[np.int64]


def choose_knots(
    layers: Sequence[Layer],
    widths: Mapping[str, Integers],
    sizes: Mapping[str, int],
    stairs: Mapping[Signature, tuple[Stairs, Stairs]],
    quantum: int,
    max_cells: int,
) -> tuple[Axes, ...]:
    """Return the channels to measure for each signature.

    Where the cells suffice, everything that can be is measured, and nothing is taken for granted. Else only
    the ends of the steps are, and if these are too many as well, some of them: every axis starts with its
    first and last, then the axis with the largest expected error gets one more, evenly spread, as long as
    the cells suffice. The error falls with the square of the points, is larger where the probes were far from
    a straight line, and counts as much as the signature's share of the network.

    Args:
        layers: Of the network.
        widths: That each group may have, rising.
        sizes: Of the groups.
        stairs: Of each signature, along what is read and made.
        quantum: Fewer channels than this, of narrow groups or an image, are on no step: that was not probed.
        max_cells: How many cells at most; at least the ends of all axes are measured whatever it says.
    """
    signatures = list(dict.fromkeys(layer.signature for layer in layers))
    reachable = [axis[axis > 0] for one in signatures for axis in axes_of(one, layers, widths)]
    if _cells(list(map(len, reachable))) <= max_cells:
        return _axes(signatures, reachable, [1] * len(reachable))
    shares = _shares(layers, sizes)
    along = [each for one in signatures for each in stairs[one]]
    ends = [
        np.union1d(channels[channels < quantum], stepped(channels[channels >= quantum], each.step, channels))
        for channels, each in zip(reachable, along, strict=True)
    ]
    weights = [shares[signatures[axis // 2]] * each.roughness for axis, each in enumerate(along)]
    counts = [min(2, len(channels)) for channels in ends]
    growing = {axis for axis, channels in enumerate(ends) if counts[axis] < len(channels)}
    while growing:
        axis = max(sorted(growing), key=lambda at: weights[at] / counts[at] ** 2)
        more = [count + (number == axis) for number, count in enumerate(counts)]
        fits = _cells(more) <= max_cells
        counts = more if fits else counts
        if not fits or counts[axis] == len(ends[axis]):
            growing.discard(axis)
    chosen = [
        channels[np.unique(np.linspace(0, len(channels) - 1, count).round().astype(int))]
        for channels, count in zip(ends, counts, strict=True)
    ]
    return _axes(signatures, chosen, [each.step for each in along])


def _cells(points: Sequence[int]) -> int:
    """Return how many cells there are with so many points along each axis, two axes a signature."""
    return sum(reads * makes for reads, makes in zip(points[::2], points[1::2], strict=True))


def _axes(
    signatures: Sequence[Signature], channels: Sequence[Integers], steps: Sequence[int]
) -> tuple[Axes, ...]:
    return tuple(
        Axes(
            signature=signature,
            reads=tuple(channels[at].tolist()),
            makes=tuple(channels[at + 1].tolist()),
            reads_step=steps[at],
            makes_step=steps[at + 1],
        )
        for at, signature in zip(range(0, len(channels), 2), signatures, strict=True)
    )


def _shares(layers: Sequence[Layer], sizes: Mapping[str, int]) -> dict[Signature, float]:
    """Return each signature's share of the network: mean of those of the multiply-adds and of the layers."""
    macs = [macs_of(layer, sizes) for layer in layers]
    total = sum(macs) or 1.0
    shares: dict[Signature, float] = {}
    for layer, count in zip(layers, macs, strict=True):
        share = (count / total + 1 / len(layers)) / 2
        shares[layer.signature] = shares.get(layer.signature, 0.0) + share
    return shares


def macs_of(layer: Layer, sizes: Mapping[str, int]) -> float:
    """Return the multiply-adds of a layer for one example, at given widths."""
    weights = value_of(layer.reads, sizes) * value_of(layer.makes, sizes) * prod(layer.signature.kernel)
    return float(weights * layer.signature.macs_a_weight)


def value_of(form: Form, widths: Mapping[str, int]) -> int:
    """Return the value of a form at given widths."""
    return form.constant + sum(count * widths[name] for name, count in form.groups.items())
