"""The file of a latency table, field by field: raw measurements, and nothing fitted.

Times are those of blocks of calls, each beside the block of a reference that ran in the same round.
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Final, Literal, TypeAlias

import numpy as np
from pydantic import Field, JsonValue, ValidationError, model_validator

from archsearch.bounded_yaml import shown
from archsearch.errors import SpecError
from archsearch.latency.cells import Cell, Frozen, Layer, Signature
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
                if width and width not in group.widths:  # 0 in a residual branch that is gone
                    raise ValueError(f"a network has {width} channels in {shown(group.name)}: no known width")
        return self


def parse(data: object, where: str) -> Content:
    """Check the data of a file.

    Raises:
        SpecError: As ``file: field: reason``, for the first rule that is broken.
    """
    if isinstance(data, dict) and data.get("format") != FORMAT:
        raise SpecError(
            f"{where}: format: is {shown(data.get('format'))}, this version reads {FORMAT}: profile the "
            "device again"
        )
    try:
        # Strict in JSON's own way: a list may be a tuple, but no text a number.
        return Content.model_validate_json(json.dumps(data))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        reason = first["msg"].removeprefix("Value error, ")
        raise SpecError(f"{where}: {place + ': ' if place else ''}{shown(reason, 300)[1:-1]}") from None
