"""The channel quantum of a device: the multiples of channels that are worth having.

Kernels work on blocks of channels, so that time over channels is a staircase, and a width between two steps
costs as much as the next step, or more. A few narrow probes around 64 channels show where the steps are.

The rule: the quantum is the largest ``q`` for which no kind of width between its multiples is clearly faster
than the next multiple. The kinds are the odd multiples of ``q / 2``, of ``q / 4`` and so on: each must save
less than a quarter of what its share of the channels promises. What a width promises is its distance to the
next multiple of ``q`` times the mean slope of the curve; what it saves is how much faster than that one it
is, and less than nothing where it is slower. (The smallest such ``q`` would always be 1.)

Below one block of channels kernels are often other ones, which the probes do not see. So groups that a
quantum leaves nearly nothing to choose get finer multiples: their cells are measured too, and say what these
are worth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from archsearch.latency.cells import DEPTHWISE, Frozen, Signature

Allowed: TypeAlias = Callable[[int], Mapping[str, npt.NDArray[np.int64]]]
"""Returns the widths that each group may have, given the multiples of channels worth having."""

CANDIDATES = (2, 4, 8, 16, 32)

TOP = 64
"""Channels around which is probed."""

PROBES = (32, 36, 40, 44, 48, 50, 52, 54, 56, 57, 58, 59, 60, 61, 62, 63, TOP)
"""Widths of every kind between the multiples of each candidate, and the next multiple of each of them."""

WORTH = 0.25
"""Widths are worth having if they save this share of what they promise."""

FLAT = 0.1
"""Half of the channels save at least this share of the time, or the channels do not matter."""

UNKNOWN = 8
"""The quantum where the channels of no layer matter: no step can be seen then, and where they come to matter,
with larger batches, kernels like multiples of eight."""

FEWEST = 4
"""Widths that a group should have to choose from."""

FINEST = 8
"""Multiples that are not halved to get there: eight float32 fill a vector register of AVX2."""


class Staircase(Frozen):
    """Time over channels of one kind of layer.

    Attributes:
        op: What was probed, such as ``3x3``.
        axis: Whether the channels are those that are read or made.
        layers: How many layers of the network are such.
        channels: Rising; ``PROBES``.
        ms: At each of them.
    """

    op: str
    axis: str
    layers: int
    channels: tuple[int, ...] = Field(min_length=2, max_length=1024)
    ms: tuple[float, ...] = Field(min_length=2, max_length=1024)

    @model_validator(mode="after")
    def _pairs(self) -> Staircase:
        if len(self.ms) != len(self.channels) or any(b <= a for a, b in pairwise((0, *self.channels))):
            raise ValueError("channels must rise, from 1 on, with one time for each")
        return self

    @property
    def slope(self) -> float:
        """Milliseconds a channel on average, from the fewest probed to the most."""
        return (self.ms[-1] - self.ms[0]) / (self.channels[-1] - self.channels[0])

    @property
    def flat(self) -> bool:
        """Whether the channels hardly matter, because something else takes the time."""
        return self.slope * self.channels[-1] / 2 < FLAT * self.ms[-1]

    def saving(self, quantum: int, part: int) -> float:
        """Return what the odd multiples of a part of a quantum save, as a share of what they promise."""
        at = dict(zip(self.channels, self.ms, strict=True))
        saved = promised = 0.0
        for width in self.channels:
            above = -(-width // quantum) * quantum
            if width % (2 * part) == part and above in at:
                saved += at[above] - at[width]
                promised += self.slope * (above - width)
        return saved / promised

    @property
    def quantum(self) -> int:
        """The quantum of this kind of layer alone; 1 where the channels hardly matter."""
        return 1 if self.flat else find_quantum([self])

    @property
    def block(self) -> int:
        """Channels that cost as much as one of them does.

        The quantum is blind to steps where the last probe is off, and ``step`` where widths between are
        slower.
        """
        return max(self.quantum, self.step(1))

    @property
    def roughness(self) -> float:
        """How far the curve is from a line: the share of its deviation that the line leaves, 0 to 1."""
        ms = np.array(self.ms)
        line = np.polyval(np.polyfit(self.channels, ms, 1), self.channels)
        return float((ms - line).std() / (ms.std() or 1.0))

    def step(self, multiple: int) -> int:
        """Return the largest step on which all multiples of a number take the same time; 1 if there is none.

        The slope within the steps, by least squares, must be under a quarter of the curve's own. One probe
        that is off, such as a power of two that the caches do not like, hardly moves it.
        """
        probes = [each for each in zip(self.channels, self.ms, strict=True) if each[0] % multiple == 0]
        for step in reversed(CANDIDATES):
            if step > multiple and step % multiple == 0 and self._rise(probes, step) < WORTH * self.slope:
                return step
        return 1

    def _rise(self, probes: Sequence[tuple[int, float]], step: int) -> float:
        """Return the slope within the steps; infinite where no two probes share one."""
        covariance = variance = 0.0
        for end in range(step, self.channels[-1] + 1, step):
            points = np.array([each for each in probes if end - step < each[0] <= end]).reshape(-1, 2)
            if len(points) > 1:
                centred = points - points.mean(axis=0)
                covariance += float(centred[:, 0] @ centred[:, 1])
                variance += float(centred[:, 0] @ centred[:, 0])
        return covariance / variance if variance else float("inf")


def find_quantum(staircases: Sequence[Staircase]) -> int:
    """Return the quantum by the rule above, at most 32.

    The savings of the kinds of layers are averaged by how many layers there are of each. Kinds whose channels
    hardly matter have no say; 8 if all are such.
    """
    known = [staircase for staircase in staircases if not staircase.flat]
    layers = sum(staircase.layers for staircase in known)

    def saving(quantum: int, part: int) -> float:
        return sum(staircase.layers * staircase.saving(quantum, part) for staircase in known) / layers

    if not known:
        return UNKNOWN
    for quantum in reversed(CANDIDATES):
        parts = [part for part in (1, *CANDIDATES) if part < quantum]
        if all(saving(quantum, part) < WORTH for part in parts):
            return quantum
    return 1


def choose_widths(allowed: Allowed, quantum: int) -> dict[str, npt.NDArray[np.int64]]:
    """Return the widths of each group: multiples of the quantum, or of less where that leaves too few.

    A group that would have fewer than four gets multiples of half of the quantum, or half of this and so on,
    down to eight.
    """
    widths = dict(allowed(quantum))
    while quantum % 2 == 0 and quantum // 2 >= FINEST:
        quantum //= 2
        finer = allowed(quantum)
        widths = {name: finer[name] if len(steps) < FEWEST else steps for name, steps in widths.items()}
    return widths


@dataclass(frozen=True)
class Stairs:
    """How the time of a layer depends on its channels along one axis, as far as the grid of its cells goes.

    Attributes:
        step: On which all channels take the same time; 1 if there is none, or it was not probed.
        roughness: See ``Staircase``; 1 if it was not probed.
    """

    step: int = 1
    roughness: float = 1.0


def stairs_of(signature: Signature, staircases: Sequence[Staircase], quantum: int) -> tuple[Stairs, Stairs]:
    """Return the stairs of a layer along the channels that it reads, and along those that it makes.

    Args:
        signature: Of the layer.
        staircases: That were probed.
        quantum: Channels are multiples of it.
    """
    if signature.groups not in (1, DEPTHWISE) or signature.multiplier > 1:
        return Stairs(), Stairs()  # its channels come in multiples of their own
    own = {
        curve.axis: Stairs(1 if curve.flat else curve.step(quantum), curve.roughness)
        for curve in staircases
        if curve.op == signature.op
    }
    reads = Stairs() if signature.groups == DEPTHWISE else own.get("reads", Stairs())
    return reads, own.get("makes", Stairs())
