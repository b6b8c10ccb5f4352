"""How a profile measures: its settings, and what prepares and times the networks."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Protocol, TypeAlias

from torch import nn

from archsearch.errors import UsageError
from archsearch.latency import measure
from archsearch.latency.devices import opened
from archsearch.latency.measurement import FEWEST_BLOCKS


@dataclass(frozen=True)
class Settings:
    """What to measure and how.

    Attributes:
        runtime: What runs the networks.
        device: Where.
        dtype: Of weights and inputs.
        batch: Examples at once.
        threads: Of the CPU.
        channels_last: Whether channels are innermost in memory.
        max_cells: Cells at most, those of the probes among them.
        calibration: Networks that the correction is fitted on.
        held_out: Networks to test with, half of them of equal MACs.
        round_to: Multiples of channels to make the table for; ``None`` takes the quantum that is found.
        seed: Of the networks' widths.
        max_seconds: Of the whole profile, to prepare and to measure; ``None`` is as long as it takes.
        blocks: Timed blocks of each cell and each network.
    """

    runtime: str = "torch"
    device: str = "cpu"
    dtype: str = "float32"
    batch: int = 1
    threads: int = 1
    channels_last: bool = True
    max_cells: int = 300
    calibration: int = 20
    held_out: int = 20
    round_to: int | None = None
    seed: int = 0
    max_seconds: float | None = None
    blocks: int = 10

    def __post_init__(self) -> None:
        for name, least in (
            ("batch", 1),
            ("threads", 1),
            ("max_cells", 1),
            ("calibration", 10),
            ("held_out", 10),
            ("blocks", FEWEST_BLOCKS),
        ):
            if getattr(self, name) < least:
                raise UsageError(f"{name} {getattr(self, name)}: at least {least}")
        if self.round_to is not None and self.round_to < 1:
            raise UsageError(f"round_to {self.round_to}: channels are multiples of 1 or more")
        if self.max_seconds is not None and not (isfinite(self.max_seconds) and self.max_seconds > 0):
            raise UsageError(f"max_seconds {self.max_seconds}: a number above 0")

    @property
    def cells(self) -> measure.Protocol:
        """How long a cell is measured."""
        return self._protocol(warm_up_s=0.01, block_s=0.005, max_s=2.0)

    @property
    def networks(self) -> measure.Protocol:
        """How long a network is."""
        return self._protocol(warm_up_s=0.1, block_s=0.04, max_s=5.0)

    def _protocol(self, *, warm_up_s: float, block_s: float, max_s: float) -> measure.Protocol:
        """Return a protocol; a GPU needs longer than a processor until its clocks are up."""
        on_gpu = self.device.startswith("cuda")
        return measure.Protocol(
            warm_up_s=max(warm_up_s, 0.2) if on_gpu else warm_up_s,
            warm_up_calls=10 if on_gpu else 5,
            blocks=self.blocks,
            block_s=block_s,
            max_s=max_s,
            threads=self.threads,
        )


Made: TypeAlias = tuple[nn.Module, Any]
"""A network and its input."""


class Meter(Protocol):
    """What prepares and measures networks; the tests have one with a clock of its own.

    Attributes:
        flags: What had to be said of measurements, such as ``"cut short"``, and of how many.
    """

    flags: Counter[str]

    def prepare(self, model: nn.Module, example: Any) -> Any:
        """Return a call that runs a network."""
        ...

    def measure(self, calls: Sequence[Any], protocol: measure.Protocol) -> list[tuple[float, ...]]:
        """Return the milliseconds of a call in each block, the blocks of the calls taking turns."""
        ...

    def seconds(self) -> float:
        """Return a clock."""
        ...


class RuntimeMeter:
    """Measure with a runtime on a device.

    On a GPU, cells are measured with an empty second-level cache, since inside a network the layers before
    drive their weights out of it; networks are measured warm, and beside their replays where there are such.

    Attributes:
        flags: What had to be said of measurements, such as ``"cut short"``, and of how many.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._device = opened(settings.device, settings.threads)
        self.flags: Counter[str] = Counter()

    def prepare(self, model: nn.Module, example: Any) -> Any:
        """Return a call that runs a network."""
        chosen = self._settings
        return measure.prepare(
            model,
            example,
            chosen.runtime,
            device=self._device,
            dtype=chosen.dtype,
            channels_last=chosen.channels_last,
            threads=chosen.threads,
        )

    def measure(self, calls: Sequence[Any], protocol: measure.Protocol) -> list[tuple[float, ...]]:
        """Return the milliseconds of a call in each block, the blocks of the calls taking turns."""
        chosen, on_gpu = self._settings, self._device.kind == "cuda"
        if on_gpu and protocol == chosen.networks:
            measured = measure.measure_beside_replays(calls, chosen.runtime, protocol, self._device)
        else:
            flush = on_gpu and protocol == chosen.cells
            measured = measure.measure_interleaved(calls, protocol, self._device, flush=flush)
        self.flags.update(flag.partition(":")[0] for one in measured for flag in one.flags)
        return [one.milliseconds for one in measured]

    def seconds(self) -> float:
        """Return the host's clock."""
        return time.monotonic()
