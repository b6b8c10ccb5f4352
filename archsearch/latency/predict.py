"""From measured cells and a few measured networks to the latency of any widths.

The time of a network is nearly the sum of its layers' times, each looked up in a grid over the channels that
it reads and makes. What the sum misses (additions, poolings, what a layer measured alone finds in the caches)
is fitted on whole networks, as an affine function with no negative coefficient of: the sum, the elements
that layers write, the multiply-adds of layers that make ragged channels (kernels like multiples of four, and
few cells between these are measured), the layers that are gone with a residual branch (zeros in their place
are added all the same), and the weights beyond the caches; then the cells of each signature get a factor of
their own (``correction``). All but the caches are sums over the layers: the correction goes into the grids,
and a prediction is a look-up a layer.

Steps are never interpolated: a grid has every count of channels that can be, or the ends of the steps that
were found along its two axes, and what lies on a step takes the time of its end. Where the ends are too many
to measure, the ones between measured points come from these by bilinear interpolation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from archsearch.errors import UsageError
from archsearch.latency.cells import Form, Layer, Signature
from archsearch.latency.correction import Correction

Floats: TypeAlias = npt.NDArray[np.float64]
Integers: TypeAlias = npt.NDArray[np.int64]

FEATURES = ("cells", "written", "ragged", "gone", "weights")

VECTOR = 4
"""Channels whose multiples kernels like: 128 bits of float32."""

MAX_SUMS = 2**20
"""Of the widths of the groups that one layer reads."""

MAX_ENTRIES = 2**23
"""Of the table of one signature."""

CHUNK = 4096
"""Candidates at once, so that what is looked up stays in the caches."""


@dataclass(frozen=True)
class Knots:
    """Measured times of one signature, on a grid.

    Attributes:
        reads: Rising, ``(R,)``.
        makes: Rising, ``(M,)``.
        ms: ``(R, M)``.
        steps: Of the staircase along either axis; what lies on one takes the time of its end, but a knot its
            own.
    """

    reads: Integers
    makes: Integers
    ms: Floats
    steps: tuple[int, int] = (1, 1)

    def at(self, reads: Integers, makes: Integers) -> Floats:
        """Return the times at other channels, ``(R', M')``: on a step, those of its end."""
        reads, makes = (
            np.where(np.isin(channels, known), channels, stepped(channels, step, known))
            for channels, step, known in zip(
                (reads, makes), self.steps, (self.reads, self.makes), strict=True
            )
        )
        rows = np.stack([np.interp(makes, self.makes, row) for row in self.ms])
        return np.stack([np.interp(reads, self.reads, column) for column in rows.T], axis=-1)


def stepped(channels: Integers, step: int, known: Integers) -> Integers:
    """Return the next multiple of a step from each count of channels on, or the largest that is known.

    Fewer channels than a step stay: kernels for them are often other ones, of which the probes know nothing.
    """
    ends = np.minimum(-(-channels // step) * step, known[-1])
    return np.where(channels < step, channels, ends)


def reachable(form: Form, widths: Mapping[str, Integers]) -> Integers:
    """Return the values of a form where each group has one of its widths, rising.

    Raises:
        UsageError: If they are too many.
    """
    values = np.array([form.constant])
    for name, count in form.groups.items():
        steps = widths[name]
        if len(values) * len(steps) > MAX_SUMS:
            raise UsageError(
                f"a layer reads so many groups that {len(values) * len(steps):,} sums are possible"
            )
        values = np.unique(values[:, None] + count * steps)
    return values


class Features:
    """What the correction is fitted on, for each layer by its channels.

    Args:
        layers: Of the network.
        widths: That each group may have, rising; the groups are the columns of every array of widths.
        knots: Measured times by signature.

    Attributes:
        tables: The features of each signature by its channels, ``(R, M, 5)``; see ``FEATURES``.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        widths: Mapping[str, Integers],
        knots: Mapping[Signature, Knots],
    ) -> None:
        self.widths = widths
        signatures = list(dict.fromkeys(layer.signature for layer in layers))
        axes = {signature: axes_of(signature, layers, widths) for signature in signatures}
        self.tables = [_features(signature, *axes[signature], knots[signature]) for signature in signatures]
        sizes = [len(axes[signature][0]) * len(axes[signature][1]) for signature in signatures]
        starts = dict(zip(signatures, np.cumsum([0, *sizes]).tolist(), strict=False))
        names = tuple(widths)
        self._reads, self._makes = _Axis(names), _Axis(names)
        for layer in layers:
            reads, makes = axes[layer.signature]
            self._reads.add(layer.reads, reads, len(makes), starts[layer.signature])
            self._makes.add(layer.makes, makes)
        self._signatures = np.array([signatures.index(layer.signature) for layer in layers])
        self._weights_a_pair = np.array([float(prod(layer.signature.kernel)) for layer in layers])
        self._macs_a_pair = np.array(
            [prod(layer.signature.kernel) * float(layer.signature.macs_a_weight) for layer in layers]
        )
        self._known = np.zeros((len(names), 1 + max(int(steps[-1]) for steps in widths.values())), dtype=bool)
        self._known[:, 0] = True  # a residual branch that is gone
        for row, steps in enumerate(widths.values()):
            self._known[row, steps] = True

    def positions(self, widths: Integers) -> Integers:
        """Return where each layer of each candidate is in the joint tables, ``(B, G) -> (B, L)``."""
        floating = widths.astype(np.float64)
        return self._reads.positions(floating) + self._makes.positions(floating)

    def of(self, widths: Integers) -> Floats:
        """Return the features of candidates, ``(B, G) -> (B, 5)``."""
        joint = np.concatenate([table.reshape(-1, len(FEATURES)) for table in self.tables])
        sums: Floats = joint[self.positions(widths)].sum(axis=1)
        return sums

    def parts(self, widths: Integers) -> Floats:
        """Return how much of the cells' sum is each signature's, ``(B, G) -> (B, S)``."""
        cells = np.concatenate([table[..., 0].ravel() for table in self.tables])[self.positions(widths)]
        parts: Floats = cells @ np.eye(len(self.tables))[self._signatures]
        return parts

    def macs(self, widths: Integers) -> Floats:
        """Return the multiply-adds of all layers for one example, ``(B, G) -> (B,)``."""
        macs: Floats = self._pairs(widths) @ self._macs_a_pair
        return macs

    def weights(self, widths: Integers) -> Floats:
        """Return the weights of all layers, ``(B, G) -> (B,)``."""
        weights: Floats = self._pairs(widths) @ self._weights_a_pair
        return weights

    def _pairs(self, widths: Integers) -> Floats:
        """Return the pairs of channels of each layer, ``(B, G) -> (B, L)``."""
        floating = widths.astype(np.float64)
        return self._reads.channels(floating) * self._makes.channels(floating)

    def check(self, widths: Integers) -> None:
        """Check widths ``(B, G)``.

        Raises:
            UsageError: If some are not among those that the table knows.
        """
        inside = (widths >= 0) & (widths < self._known.shape[1])
        known = inside & self._known[np.arange(len(self.widths)), np.where(inside, widths, 0)]
        if known.all():
            return
        row, group = np.argwhere(~known)[0]
        name = list(self.widths)[group]
        steps = self.widths[name]
        shown = ", ".join(map(str, steps[:8])) + (", …" if len(steps) > 8 else "")
        raise UsageError(
            f"the latency table knows no width {widths[row, group]} of the group '{name}', but {shown}: "
            "give --round-to the table's quantum or a multiple of it"
        )


def axes_of(
    signature: Signature, layers: Sequence[Layer], widths: Mapping[str, Integers]
) -> tuple[Integers, Integers]:
    """Return the channels that layers of a signature may read and make, rising, 0 among them."""
    same = [layer for layer in layers if layer.signature == signature]
    reads = np.concatenate([[0], *(reachable(layer.reads, widths) for layer in same)])
    makes = np.concatenate([[0], *(reachable(layer.makes, widths) for layer in same)])
    return np.unique(reads).astype(np.int64), np.unique(makes).astype(np.int64)


def _features(signature: Signature, reads: Integers, makes: Integers, knots: Knots) -> Floats:
    """Return the features of a layer by its channels, ``(R, M, 5)``; one without channels is only gone."""
    if len(reads) * len(makes) > MAX_ENTRIES:
        raise UsageError(f"the layers {signature} have {len(reads)} times {len(makes)} possible channels")
    rows, columns = np.meshgrid(reads, makes, indexing="ij")
    gone = (rows == 0) | (columns == 0)
    features = np.stack(
        [
            knots.at(reads, makes),
            columns * float(signature.output_pixels),
            rows * columns * float(signature.macs_a_weight * prod(signature.kernel)) * (columns % VECTOR > 0),
            np.zeros(gone.shape),
            rows * columns * float(prod(signature.kernel)),
        ],
        axis=-1,
    )
    features[gone] = 0
    features[gone, FEATURES.index("gone")] = 1
    return features


class _Axis:
    """One of the two channel counts of all layers, and where it is in the joint tables."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._forms: list[Floats] = []
        self._places: list[Integers] = []

    def add(self, form: Form, channels: Integers, stride: int = 1, start: int = 0) -> None:
        """Add a layer whose table has a row of ``stride`` entries for each of ``channels``."""
        groups = [form.groups.get(name, 0) for name in self._names]
        self._forms.append(np.array([form.constant, *groups], dtype=np.float64))
        # Channels that are not there, since a branch is gone, take the next ones.
        place = np.searchsorted(channels, np.arange(channels[-1] + 1))
        self._places.append(start + stride * place)

    def positions(self, widths: Floats) -> Integers:
        """Return the places of candidates, ``(B, G) -> (B, L)``."""
        places: Integers = self._joint[self.channels(widths).astype(np.int64) + self._offsets]
        return places

    def channels(self, widths: Floats) -> Floats:
        """Return the channels of each layer, ``(B, G) -> (B, L)``."""
        channels: Floats = widths @ self._matrix[1:] + self._matrix[0]
        return channels

    @cached_property
    def _matrix(self) -> Floats:
        return np.stack(self._forms, axis=-1)

    @cached_property
    def _joint(self) -> Integers:
        return np.concatenate(self._places)

    @cached_property
    def _offsets(self) -> Integers:
        return np.cumsum([0, *(len(place) for place in self._places[:-1])])


class Predictor:
    """Predict the latency of candidates.

    Args:
        features: Of the layers.
        correction: Fitted on measured networks.
    """

    def __init__(self, features: Features, correction: Correction) -> None:
        self.features, self.correction = features, correction
        tables = [table @ correction.of_signature(number) for number, table in enumerate(features.tables)]
        rising = [np.maximum.accumulate(np.maximum.accumulate(table, 0), 1) for table in tables]
        self._times = np.concatenate([table.ravel() for table in tables])
        self._rising = np.concatenate([table.ravel() for table in rising])

    def __call__(self, widths: npt.ArrayLike) -> tuple[Floats, Floats, Floats]:
        """Return milliseconds and the ends of their interval, ``(..., G) -> (...)``."""
        ms = self._sum(widths, self._times)
        margin = self.correction.margin
        return ms, ms * max(0.0, 1 - margin), ms * (1 + margin)

    def upper_ns(self, widths: npt.ArrayLike) -> Integers:
        """Return an upper bound in nanoseconds that more channels never lower, ``(..., G) -> (...)``.

        A staircase may fall, where more channels are faster; the bound takes the running maximum of each
        layer's times over its channels. It is never below the upper end of the interval.
        """
        ms = self._sum(widths, self._rising) * (1 + self.correction.margin)
        nanoseconds: Integers = np.ceil(ms * 1e6).astype(np.int64)
        return nanoseconds

    def _sum(self, widths: npt.ArrayLike, times: Floats) -> Floats:
        given = np.asarray(widths, dtype=np.int64)
        rows = given.reshape(-1, given.shape[-1])
        sums = np.empty(len(rows))
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            self.features.check(chunk)
            part = times[self.features.positions(chunk)].sum(-1)
            if self.correction.free_weights:
                part += self.correction.beyond_caches_ms(self.features.weights(chunk))
            sums[start : start + CHUNK] = part
        return (sums + self.correction.constant_ms).reshape(given.shape[:-1])
