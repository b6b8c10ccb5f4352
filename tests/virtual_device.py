"""A device with a clock of its own, that works through a queue as a GPU does, in no time at all.

Every millisecond is given by the test, so that what the timing loop reports can be compared exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from archsearch.latency.devices import Call


@dataclass
class VirtualDevice:
    """An accelerator that is slow until it is warm, and whose first call after a wait is slow.

    Attributes:
        cold_factor: How many times longer work takes until ``warm_ms`` of work were done.
        first_ms: What the first work after every wait takes longer.
        drift: By which factor all work has become slower after each second of the wall's clock.
        slow: From the wall's clock in seconds to the reasons why the device slows itself down.
    """

    name: str = "virtual:0"
    kind: str = "cuda"
    tf32: bool = False
    warm_ms: float = 150.0
    cold_factor: float = 3.0
    first_ms: float = 0.5
    flush_ms: float = 0.25
    drift: float = 0.0
    slow: Callable[[float], frozenset[str]] = lambda now: frozenset()
    wall_ms: float = 0.0
    ready_ms: float = 0.0  # when the queue will be empty
    worked_ms: float = 0.0
    waited: bool = True
    flushes: int = 0
    log: list[str] = field(default_factory=list)

    def call(self, name: str, work_ms: float, launch_ms: float = 0.01, kernels: int = 1) -> Call:
        """Return a call that starts so many kernels of ``work_ms`` together; each takes time to start."""

        def start() -> None:
            self.log.append(name)
            for _ in range(kernels):
                self.wall_ms += launch_ms
                self._work(work_ms / kernels)

        start.kernels = kernels  # type: ignore[attr-defined]
        start.work_ms = work_ms  # type: ignore[attr-defined]
        return start

    def current(self) -> AbstractContextManager[None]:
        return nullcontext()

    def seconds(self) -> float:
        return self.wall_ms / 1e3

    def synchronise(self) -> None:
        self.wall_ms = max(self.wall_ms, self.ready_ms)
        self.waited = True
        self.log.append("wait")

    def event(self) -> float:
        return max(self.wall_ms, self.ready_ms)

    def elapsed_ms(self, start: float, end: float) -> float:
        assert end <= self.wall_ms, "an event was read before the device had reached it"
        return end - start

    def flush(self) -> None:
        self.flushes += 1
        self.log.append("flush")
        self._work(self.flush_ms)

    def slowdowns(self) -> frozenset[str]:
        return self.slow(self.seconds())

    def capture(self, call: Any) -> Call:
        return self.call("replay", call.work_ms)

    def working_bytes(self, call: Call) -> int | None:
        return None

    def facts(self) -> dict[str, Any]:
        return {"accelerator": "virtual"}

    def _work(self, milliseconds: float) -> None:
        factor = self.cold_factor if self.worked_ms < self.warm_ms else 1.0
        factor *= 1 + self.drift * self.seconds()
        if self.waited:
            milliseconds += self.first_ms
            self.waited = False
        self.worked_ms += milliseconds * factor
        self.ready_ms = max(self.wall_ms, self.ready_ms) + milliseconds * factor
