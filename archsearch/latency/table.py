"""The latency table: what was measured on one device, and what that predicts.

Nothing fitted is kept: the predictor is made anew whenever a file is read, so that a table measured once gets
better with the program. What counts of a measurement is the median of its ratios to the reference that ran in
the same rounds, times the median of the reference over the whole profile, so that a machine that was slower
for a minute does no harm.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import zip_longest
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from archsearch import files
from archsearch.errors import SpecError, UsageError
from archsearch.latency.boundary import Boundary
from archsearch.latency.cells import Cell, Layer, Signature, input_channels
from archsearch.latency.content import Content, Role, Times, parse
from archsearch.latency.correction import Correction
from archsearch.latency.fingerprint import differences
from archsearch.latency.predict import Features, Floats, Integers, Knots, Predictor

FITTED: Final[tuple[Role, ...]] = ("calibration", "held-out", "equal-macs")
"""Networks that predictions are fitted on, once those fitted on the first kind were tested on the others."""


class LatencyTable:
    """Predicts latencies from what was measured.

    Args:
        content: Of the file.

    Attributes:
        names: The groups, in the order of the columns of every ``(..., G)`` array of widths.
        sizes: Their sizes in the reference, ``(G,)``.
        quantum: The multiples of channels that are worth having; narrow groups have finer ones as well.

    Raises:
        UsageError: If there are too few calibration networks.
    """

    def __init__(self, content: Content) -> None:
        self.content = content
        self.names = tuple(group.name for group in content.groups)
        self.sizes = np.array([group.size for group in content.groups], dtype=np.int64)
        self.quantum = content.quantum
        widths = {group.name: np.array(group.widths) for group in content.groups}
        self.features = Features(content.layers, widths, self._knots())
        self._predictor = self.fitted(*self.networks(*FITTED))

    @classmethod
    def read(
        cls,
        path: files.Location,
        fingerprint: Mapping[str, Any] | None = None,
    ) -> LatencyTable:
        """Read a table.

        Args:
            path: The JSON file.
            fingerprint: Of the device at hand; ``None`` leaves it unchecked, for a search elsewhere.

        Raises:
            SpecError: If the file breaks a rule.
            UsageError: If it was measured under other conditions.
        """
        content = parse(files.read_json(path), files.named(path))
        other = differences(content.fingerprint, fingerprint) if fingerprint is not None else []
        if other:
            raise UsageError(
                f"{files.named(path)}: was measured elsewhere ({'; '.join(other)}): profile this device"
            )
        try:
            return cls(content)
        except UsageError as error:
            raise SpecError(f"{files.named(path)}: networks: {error}") from None

    def write(self, path: files.Location) -> None:
        """Write the file."""
        files.write_json(path, self.content.model_dump(mode="json"))

    @property
    def key(self) -> str:
        """Hash of the content, which tells this table from every other."""
        text = json.dumps(self.content.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def knows_branches(self) -> bool:
        """Whether networks that lack residual branches are among those that it is fitted on."""
        return bool((self.networks(*FITTED)[0] == 0).any())

    def predict(self, widths: npt.ArrayLike) -> tuple[Floats, Floats, Floats]:
        """Return milliseconds, and the lower and upper end of their 90 % interval, ``(..., G) -> (...)``.

        Raises:
            UsageError: If a width is not one that the table knows.
        """
        return self._predictor(widths)

    @cached_property
    def tested(self) -> Predictor:
        """What the held-out networks test: the prediction fitted on the calibration networks alone."""
        return self.fitted(*self.networks("calibration"))

    def fitted(self, widths: Integers, ms: Floats) -> Predictor:
        """Return the prediction fitted on networks of these widths ``(N, G)`` and milliseconds ``(N,)``.

        Raises:
            UsageError: If they are too few.
        """
        fit = Correction.fit(self.features.of(widths), ms, self.features.parts(widths))
        return Predictor(self.features, fit)

    def counter(self) -> Callable[[Integers], Integers]:
        """Return what counts latency for the solver: an upper bound in nanoseconds, ``(..., G) -> (...)``.

        It is the upper end of the interval, made so that more channels never cost less.
        """
        return self._predictor.upper_ns

    def check_groups(self, sizes: Mapping[str, int]) -> None:
        """Check that the table is of a network with these groups.

        Raises:
            UsageError: If not; says where they differ.
        """
        own = dict(zip(self.names, self.sizes.tolist(), strict=True))
        if own == dict(sizes) and list(own) != list(sizes):
            raise UsageError(
                "the latency table has the groups of this network in another order, as another version of "
                "its code gives them: profile it again"
            )
        if own != dict(sizes):
            name = next(name for name in [*own, *sizes] if own.get(name) != sizes.get(name))
            raise UsageError(
                f"the latency table is of another network: its group '{name}' has {own.get(name, 'no')} "
                f"channels, here {sizes.get(name, 'none')}: profile this one"
            )

    def check_layers(self, layers: Sequence[Layer]) -> None:
        """Check that the table is of a network with these layers, whatever their names.

        Raises:
            UsageError: If not; says where they differ.
        """
        for own, other in zip_longest(self.content.layers, layers):
            if own is None or other is None:
                count = len(self.content.layers)
                difference = f"it has {count} layers, this one {len(layers)}"
            else:
                there, here = _told(own), _told(other)
                differs = next((name for name, value in there.items() if here[name] != value), None)
                if differs is None:
                    continue
                difference = f"its layer '{own.name}' has {differs} {there[differs]}, here {here[differs]}"
            raise UsageError(
                f"the latency table is of another network: {difference}: profile this one, with the classes "
                "and the arguments that it has here"
            )

    @property
    def reference_ms(self) -> float:
        """Latency of the reference network, as measured."""
        return self._network_anchor_ms

    def networks(self, *roles: Role) -> tuple[Integers, Floats]:
        """Return the widths ``(N, G)`` and the milliseconds ``(N,)`` of measured networks of some roles."""
        chosen = [record for record in self.content.networks if record.role in roles]
        widths = np.array([record.widths for record in chosen], dtype=np.int64).reshape(-1, len(self.names))
        return widths, np.array([record.times.ratio for record in chosen]) * self._network_anchor_ms

    def macs(self, widths: Integers) -> Floats:
        """Return the multiply-adds of the layers for one example, ``(B, G) -> (B,)``."""
        return self.features.macs(widths)

    @cached_property
    def _network_anchor_ms(self) -> float:
        return _anchor_ms([record.times for record in self.content.networks])

    def _knots(self) -> dict[Signature, Knots]:
        """Return the cells' times in the place where they stand in a network."""
        anchor_ms = _anchor_ms([record.times for record in self.content.cells])
        ms = {(record.cell, record.repeat): record.times.ratio * anchor_ms for record in self.content.cells}
        elements = {cell: self._elements(cell) for cell, _ in ms}
        boundary = Boundary.fit(ms, elements)
        return {
            axes.signature: Knots(
                np.array(axes.reads),
                np.array(axes.makes),
                np.array(
                    [
                        [
                            boundary.inside(ms[cell, 1], elements[cell])
                            for cell in (Cell(number, reads, makes) for makes in axes.makes)
                        ]
                        for reads in axes.reads
                    ]
                ),
                (axes.reads_step, axes.makes_step),
            )
            for number, axes in enumerate(self.content.axes)
        }

    def _elements(self, cell: Cell) -> int:
        signature = self.content.axes[cell.signature].signature
        inputs = input_channels(signature, cell.reads, cell.makes)
        pixels = int(np.prod(signature.size))
        return self.content.conditions.batch * (inputs * pixels + cell.makes * signature.output_pixels)


def _told(layer: Layer) -> dict[str, Any]:
    """Return what the time of a layer depends on."""
    return {**dict(layer.signature), "inputs": layer.reads, "outputs": layer.makes}


def _anchor_ms(times: Sequence[Times]) -> float:
    return float(np.median(np.concatenate([part.reference_ms for part in times]))) if times else 1.0
