"""The latency table: everything that was measured on one device, in one JSON file.

The file holds raw measurements and nothing fitted: the predictor is made anew whenever it is read, so that a
table measured once gets better with the program. Times in it are those of blocks of calls, each beside the
block of a reference that ran in the same round: what counts is the median of the ratios, times the median of
the reference over the whole profile, so that a machine that was slower for a minute does no harm.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import Field, JsonValue, ValidationError, model_validator

from archsearch import files
from archsearch.bounded_yaml import shown
from archsearch.errors import SpecError, UsageError
from archsearch.latency.boundary import Boundary
from archsearch.latency.cells import Cell, Frozen, Layer, Signature, input_channels
from archsearch.latency.correction import Correction
from archsearch.latency.fingerprint import differences
from archsearch.latency.predict import Features, Floats, Integers, Knots, Predictor
from archsearch.latency.quantum import Staircase

FORMAT: Final = 1
MAX_CHANNELS: Final = 65_536
MAX_CELLS: Final = 65_536
MAX_NETWORKS: Final = 4096
MAX_GROUPS: Final = 4096

Role: TypeAlias = Literal["calibration", "held-out", "equal-macs", "repeat"]


class Times(Frozen):
    """Mean milliseconds of a call in each block, and of the reference's call in the same round."""

    ms: tuple[float, ...] = Field(min_length=1, max_length=1024)
    reference_ms: tuple[float, ...] = Field(min_length=1, max_length=1024)

    @model_validator(mode="after")
    def _pairs(self) -> Times:
        if len(self.ms) != len(self.reference_ms):
            raise ValueError("ms and reference_ms must hold one number for each block")
        if min(*self.ms, *self.reference_ms) <= 0:
            raise ValueError("times are above zero")
        return self

    @property
    def ratio(self) -> float:
        """Median ratio to the reference in the same round."""
        return float(np.median(np.array(self.ms) / np.array(self.reference_ms)))


class CellRecord(Frozen):
    """A measured cell; ``repeat`` of it stood behind each other."""

    signature: int = Field(ge=0)
    reads: int = Field(ge=1, le=MAX_CHANNELS)
    makes: int = Field(ge=1, le=MAX_CHANNELS)
    repeat: int = Field(default=1, ge=1, le=64)
    times: Times

    @property
    def cell(self) -> Cell:
        """Which cell it is."""
        return Cell(self.signature, self.reads, self.makes)


class NetworkRecord(Frozen):
    """A measured network: its widths in the order of the groups, and what it was measured for."""

    role: Role
    widths: tuple[int, ...]
    times: Times


class Group(Frozen):
    """A channel group: its size, and the widths that the table knows, rising."""

    name: str
    size: int = Field(ge=1, le=MAX_CHANNELS)
    widths: tuple[int, ...] = Field(min_length=1, max_length=MAX_CHANNELS)

    @model_validator(mode="after")
    def _rising(self) -> Group:
        widths = (0, *self.widths)
        if any(above <= below for below, above in pairwise(widths)):
            raise ValueError("widths must rise, from 1 on")
        if self.widths[-1] > self.size:
            raise ValueError("widths must not be above the size")
        return self


class Axes(Frozen):
    """A signature, the channels between which its cells were measured (each with each), and the steps."""

    signature: Signature
    reads: tuple[int, ...] = Field(min_length=1, max_length=MAX_CHANNELS)
    makes: tuple[int, ...] = Field(min_length=1, max_length=MAX_CHANNELS)
    reads_step: int = Field(default=1, ge=1, le=MAX_CHANNELS)
    makes_step: int = Field(default=1, ge=1, le=MAX_CHANNELS)


class Conditions(Frozen):
    """What was measured, and how: a table holds for this alone."""

    model: str
    arguments: dict[str, JsonValue]
    input_shape: tuple[int, ...]
    batch: int = Field(ge=1)
    runtime: str
    device: str
    dtype: str
    threads: int = Field(ge=1)
    channels_last: bool


class Content(Frozen):
    """A table file, field by field."""

    format: Literal[1]
    conditions: Conditions
    fingerprint: dict[str, JsonValue]
    quantum: int = Field(ge=1, le=MAX_CHANNELS)
    groups: tuple[Group, ...] = Field(min_length=1, max_length=MAX_GROUPS)
    layers: tuple[Layer, ...] = Field(min_length=1, max_length=MAX_CELLS)
    axes: tuple[Axes, ...] = Field(min_length=1, max_length=MAX_CELLS)
    cells: tuple[CellRecord, ...] = Field(max_length=MAX_CELLS)
    networks: tuple[NetworkRecord, ...] = Field(max_length=MAX_NETWORKS)
    staircases: tuple[Staircase, ...] = ()
    measuring_s: float = Field(default=0.0, ge=0)
    preparing_s: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> Content:
        signatures = {axes.signature for axes in self.axes}
        names = {group.name for group in self.groups}
        if len(names) < len(self.groups):
            raise ValueError("two groups have one name")
        for layer in self.layers:
            if layer.signature not in signatures:
                raise ValueError(f"the layer {shown(layer.name)} has a signature that no axes belong to")
            unknown = {*layer.reads.groups, *layer.makes.groups} - names
            if unknown:
                raise ValueError(f"the layer {shown(layer.name)} names a group that is not there")
        measured = {record.cell for record in self.cells if record.repeat == 1}
        for number, axes in enumerate(self.axes):
            for channels in (axes.reads, axes.makes):
                if any(a >= b for a, b in pairwise(channels)) or channels[0] < 1:
                    raise ValueError(f"axes {number}: channels must rise, from 1 on")
            for reads in axes.reads:
                for makes in axes.makes:
                    if Cell(number, reads, makes) not in measured:
                        raise ValueError(f"no cell of axes {number} reads {reads} and makes {makes}")
        if any(record.signature >= len(self.axes) for record in self.cells):
            raise ValueError("a cell has a signature that is not there")
        for record in self.networks:
            if len(record.widths) != len(self.groups):
                raise ValueError("a network has not one width for each group")
            for width, group in zip(record.widths, self.groups, strict=True):
                if width not in group.widths:
                    raise ValueError(f"a network has {width} channels in {shown(group.name)}: no known width")
        return self


class LatencyTable:
    """Predicts latencies from what was measured.

    Args:
        content: Of the file.

    Attributes:
        names: The groups, in the order of the columns of every ``(..., G)`` array of widths.
        sizes: Their sizes in the reference, ``(G,)``.
        quantum: The multiples of channels that are worth having: a good default of ``--round-to``.

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
        calibration, ms = self.networks("calibration")
        self.correction = Correction.fit(self.features.of(calibration), ms, self.features.parts(calibration))
        self._predictor = Predictor(self.features, self.correction)

    @classmethod
    def read(
        cls,
        path: files.Location,
        fingerprint: Mapping[str, Any] | None = None,
        *,
        allow_other_device: bool = False,
    ) -> LatencyTable:
        """Read a table.

        Args:
            path: The JSON file.
            fingerprint: Of the device at hand; ``None`` leaves it unchecked, for a search elsewhere.
            allow_other_device: Whether another one will do.

        Raises:
            SpecError: If the file breaks a rule.
            UsageError: If it was measured under other conditions.
        """
        content = parse(files.read_json(path), files.named(path))
        other = differences(content.fingerprint, fingerprint) if fingerprint is not None else []
        if other and not allow_other_device:
            raise UsageError(
                f"{files.named(path)}: was measured elsewhere ({'; '.join(other)}): profile this device, or "
                "say that another one's table will do"
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

    def predict(self, widths: npt.ArrayLike) -> tuple[Floats, Floats, Floats]:
        """Return milliseconds, and the lower and upper end of their 90 % interval, ``(..., G) -> (...)``.

        Raises:
            UsageError: If a width is not one that the table knows.
        """
        return self._predictor(widths)

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
        if own != dict(sizes):
            name = next(name for name in [*own, *sizes] if own.get(name) != sizes.get(name))
            raise UsageError(
                f"the latency table is of another network: its group '{name}' has {own.get(name, 'no')} "
                f"channels, here {sizes.get(name, 'none')}: profile this one"
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


def _anchor_ms(times: Sequence[Times]) -> float:
    return float(np.median(np.concatenate([part.reference_ms for part in times]))) if times else 1.0


def parse(data: object, where: str) -> Content:
    """Check the data of a file.

    Raises:
        SpecError: As ``file: field: reason``, for the first rule that is broken.
    """
    if isinstance(data, dict) and data.get("format") != FORMAT:
        raise SpecError(f"{where}: format: is {shown(data.get('format'))}, this version reads {FORMAT}")
    try:
        # Strict in JSON's own way: a list may be a tuple, but no text a number.
        return Content.model_validate_json(json.dumps(data))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        reason = first["msg"].removeprefix("Value error, ")
        raise SpecError(f"{where}: {place + ': ' if place else ''}{shown(reason, 300)[1:-1]}") from None
