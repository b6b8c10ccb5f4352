"""What is asked of a measurement, and what it says: plain values, without a clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Final

from archsearch.errors import UsageError
from archsearch.latency.statistics import median, median_interval, percentile, variation

STABLE: Final = 0.02  # coefficient of variation under which a number is called stable
FEWEST_BLOCKS: Final = 3


@dataclass(frozen=True)
class Protocol:
    """How often and how long to measure.

    Attributes:
        warm_up_s: Seconds of calls before the first block, at least,
        warm_up_calls: and calls, at least.
        blocks: Blocks of each network that count.
        block_s: Seconds that a block should take; decides the calls in it.
        max_s: Seconds for each network, after which no new round of blocks starts once there are three.
        threads: Of the CPU, for one network.
    """

    warm_up_s: float = 0.2
    warm_up_calls: int = 10
    blocks: int = 10
    block_s: float = 0.05
    max_s: float = 10.0
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("warm_up_s", "block_s", "max_s"):
            value = getattr(self, name)
            if not (isfinite(value) and value >= 0):
                raise UsageError(f"{name} {value}: seconds are a number of at least 0")
        for name, fewest in (("warm_up_calls", 1), ("blocks", FEWEST_BLOCKS), ("threads", 1)):
            if getattr(self, name) < fewest:
                raise UsageError(f"{name} {getattr(self, name)}: at least {fewest}")


@dataclass(frozen=True)
class Measurement:
    """What one network took.

    Attributes:
        milliseconds: Mean time of a call in each block, on the device's own clock.
        calls_ms: Time of every call that was counted.
        wall_ms: Mean time of a call in each block on the host's clock, from the first call to the end of the
            last: what a program sees that runs the network over and over.
        ratios: ``milliseconds`` over those of the first network in the same round; empty for one alone.
        replay_ms: Median time of a call replayed as a CUDA graph, where that was measured: what the GPU needs
            when it never waits for its next kernel.
        flags: What else the reader must know, in words.
        fingerprint: Device, runtime and conditions.
    """

    milliseconds: tuple[float, ...]
    calls_ms: tuple[float, ...] = ()
    wall_ms: tuple[float, ...] = ()
    ratios: tuple[float, ...] = ()
    replay_ms: float | None = None
    flags: tuple[str, ...] = ()
    fingerprint: Mapping[str, Any] = field(default_factory=dict)

    @property
    def median_ms(self) -> float:
        """Median over the blocks."""
        return median(self.milliseconds)

    @property
    def p90_ms(self) -> float:
        """Time that nine of ten calls do not exceed."""
        return percentile(self.calls_ms or self.milliseconds, 90)

    @property
    def p99_ms(self) -> float:
        """Time that 99 of 100 calls do not exceed."""
        return percentile(self.calls_ms or self.milliseconds, 99)

    @property
    def variation(self) -> float:
        """Robust coefficient of variation between blocks: of the ratios where there are any."""
        return variation(self.ratios or self.milliseconds)

    @property
    def stable(self) -> bool:
        """Whether the variation is under 2 %."""
        return self.variation < STABLE

    @property
    def ratio(self) -> float | None:
        """Median ratio to the first network; ``None`` for one alone."""
        return median(self.ratios) if self.ratios else None

    @property
    def ratio_interval(self) -> tuple[float, float] | None:
        """95 % interval of ``ratio``."""
        return median_interval(self.ratios) if self.ratios else None

    @property
    def launch_bound(self) -> float | None:
        """Share of a call that the GPU waits for its next kernel; ``None`` where no replay was measured."""
        if self.replay_ms is None:
            return None
        return max(0.0, 1 - self.replay_ms / median(self.wall_ms or self.milliseconds))

    @property
    def words(self) -> str:
        """What is to be said beside the number; empty where it is stable and nothing was flagged."""
        unstable = () if self.stable else (f"not stable: blocks vary by {self.variation:.1%}",)
        return "; ".join([*unstable, *self.flags])

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for a record: the blocks as they were, the single calls as percentiles."""
        interval = self.ratio_interval
        return {
            "milliseconds": list(self.milliseconds),
            "wall_ms": list(self.wall_ms),
            "ratios": list(self.ratios),
            "median_ms": self.median_ms,
            "p90_ms": self.p90_ms,
            "p99_ms": self.p99_ms,
            "variation": self.variation,
            "stable": self.stable,
            "ratio": self.ratio,
            "ratio_interval": list(interval) if interval else None,
            "replay_ms": self.replay_ms,
            "launch_bound": self.launch_bound,
            "flags": list(self.flags),
            "fingerprint": dict(self.fingerprint),
        }


DEFAULT: Final = Protocol()
