"""Measure cells and networks in turn beside one reference, write each down at once, and keep to the time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from archsearch.errors import PreemptedError, UsageError
from archsearch.latency import measure
from archsearch.latency.content import Times
from archsearch.latency.journal import Entry, Journal
from archsearch.latency.meter import Made, Meter, Settings

AT_ONCE: Mapping[str, int] = {"cell": 8, "network": 4}
"""Measured beside one reference in turn."""

GRACE = 1.25
"""Of the time that was given: an estimate may be somewhat wrong without throwing away what is nearly done."""

_SHORT = measure.Protocol(warm_up_s=0.0, warm_up_calls=3, blocks=3, block_s=0.0)


@dataclass(frozen=True)
class Job:
    """One thing to measure: its name in the journal, and what makes the network and its input."""

    name: str
    make: Callable[[], Made]


class Workbench:
    """Measures cells and networks.

    Args:
        settings: How.
        meter: What measures.
        journal: Where it is written down.
        references: Make the cell, and the network, that all others are measured beside.
        say: Called with each line for the user.
        progress: Called with what is measured, how much of it is done and how much there is.

    Attributes:
        journal: As given.
    """

    def __init__(
        self,
        settings: Settings,
        meter: Meter,
        journal: Journal,
        references: Mapping[str, Callable[[], Made]],
        say: Callable[[str], None],
        progress: Callable[[str, int, int], None],
    ) -> None:
        self.journal = journal
        self._settings, self._meter, self._references = settings, meter, references
        self._say, self._progress = say, progress
        self._began = meter.seconds()
        self._ready: dict[str, Any] = {}
        self._protocols = {"cell": settings.cells, "network": settings.networks}
        self._cell_s = self._networks_s = 0.0

    def estimate(self, networks: int) -> None:
        """Say how long it will take, from the time that the references take.

        Args:
            networks: How many there will be.

        Raises:
            UsageError: If the networks alone take longer than there is time.
        """
        chosen, journal = self._settings, self.journal
        if len(journal):
            cells, found = journal.count("cell"), journal.count("network")
            self._say(f"goes on from {journal.path}: found {cells} layers and {found} networks measured")
        self._networks_s = max(0, networks - journal.count("network")) * self._seconds_of("network")
        self._cell_s = self._seconds_of("cell")
        total_s = self._networks_s + max(0, chosen.max_cells - journal.count("cell")) * self._cell_s
        self._say(
            f"takes about {total_s:.0f} s: {networks} networks and up to {chosen.max_cells} cells"
            + (
                f", cells as time allows in {chosen.max_seconds:g} s"
                if chosen.max_seconds is not None
                else ""
            )
        )
        if chosen.max_seconds is not None and self._networks_s > chosen.max_seconds:
            raise UsageError(
                f"--max-seconds {chosen.max_seconds:g}: {networks} networks alone take about "
                f"{self._networks_s:.0f} s: give more time, or fewer networks (--calibration, --held-out)"
            )

    def affordable(self, cells: int, beside: int) -> int:
        """Return how many of some cells there is time for; the same number when a profile goes on.

        Args:
            cells: That are wanted.
            beside: Cells that are measured as well, whatever they take.
        """
        limit_s = self._settings.max_seconds
        if limit_s is None:
            return cells
        grid = self.journal.grid(limit_s)
        if grid is None:
            left_s = limit_s - (self._meter.seconds() - self._began) - self._networks_s
            grid = max(0, int(left_s / self._cell_s) - beside)
            self.journal.add(Entry(seconds=limit_s, grid=grid))
        return min(cells, grid)

    def measure(self, what: str, jobs: Sequence[Job], title: str = "") -> None:
        """Measure what is not in the journal yet, several beside one reference in turn.

        Raises:
            PreemptedError: If the time is over.
        """
        missing = [job for job in jobs if job.name not in self.journal]
        done = len(jobs) - len(missing)
        self._progress(title or what, done, len(jobs))
        for start in range(0, len(missing), AT_ONCE[what]):
            self._check_time()
            group = missing[start : start + AT_ONCE[what]]
            began = self._meter.seconds()
            calls = [self._reference(what), *(self._meter.prepare(*job.make()) for job in group)]
            prepared = self._meter.seconds()
            reference, *measured = self._meter.measure(calls, self._protocols[what])
            self.journal.add(
                Entry(
                    measured={
                        job.name: Times(ms=ms, reference_ms=reference)
                        for job, ms in zip(group, measured, strict=True)
                    },
                    measuring_s=self._meter.seconds() - prepared,
                    preparing_s=prepared - began,
                )
            )
            done += len(group)
            self._progress(title or what, done, len(jobs))

    def say_flags(self) -> None:
        """Say what was amiss with measurements, each kind once."""
        for kind, count in self._meter.flags.items():
            self._say(f"{kind}: {count} measurements")

    def _reference(self, what: str) -> Any:
        if what not in self._ready:
            self._ready[what] = self._meter.prepare(*self._references[what]())
        return self._ready[what]

    def _seconds_of(self, what: str) -> float:
        """Return what it takes to prepare and measure one, from the reference."""
        self._reference(what)
        del self._ready[what]  # the first time pays for what is loaded and compiled once
        began = self._meter.seconds()
        call = self._reference(what)
        prepared = self._meter.seconds()
        self._meter.measure([call], replace(_SHORT, threads=self._settings.threads))
        # The warm-up, and in each block the call that does not count.
        once_s = (self._meter.seconds() - prepared) / (_SHORT.warm_up_calls + 2 * _SHORT.blocks)
        protocol = self._protocols[what]
        blocks_s = protocol.blocks * max(protocol.block_s, once_s)
        warm_up_s = max(protocol.warm_up_s, protocol.warm_up_calls * once_s)
        return prepared - began + (1 + 1 / AT_ONCE[what]) * (blocks_s + warm_up_s)

    def _check_time(self) -> None:
        limit_s = self._settings.max_seconds
        if limit_s is not None and self._meter.seconds() - self._began > GRACE * limit_s:
            raise PreemptedError(
                f"--max-seconds {limit_s:g} are over with {len(self.journal)} measurements done: the same "
                "command goes on from there"
            )
