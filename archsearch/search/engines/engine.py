"""The seam between the driver of a search and whoever carries out its tasks.

A task is a directory (``archsearch.search.task``): a worker reads ``task.json`` there and writes
``result.json``. An engine brings workers to tasks and knows whether they live; it opens neither file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from archsearch.registry import Registry


class Engine(Protocol):
    """Carries out tasks; used by one thread of the driver alone.

    Attributes:
        slots: How many tasks it works on at once; the driver submits no more.
        threads: CPU threads of each task. The driver writes them into the task.
    """

    slots: int
    threads: int

    def submit(self, task: Path) -> None:
        """Start the task of a directory, or queue it; the driver may submit one again that was lost."""

    def ended(self, task: Path) -> str | None:
        """Return ``None`` while a task waits or runs, ``""`` when its worker ended, else why it was lost.

        The driver asks a few times a second and looks for the result itself, so that ``""`` without a result
        counts as lost too. Must not wait.
        """

    def cancel(self, task: Path) -> None:
        """End a task at once, whichever driver submitted it; one that ended already stays as it is.

        The driver ends a task gently by a file ``stop`` in its directory, which workers look for.
        """

    def close(self) -> None:
        """End all workers, which write checkpoints if they can, and free everything."""


@dataclass(frozen=True)
class Order:
    """What an engine is made from.

    Attributes:
        jobs: Tasks at once.
        device: Of the trainings: ``cpu``, ``cuda``, ``cuda:1`` or ``auto``.
        perform: Does the task of a directory in this process.
        options: Settings of the engine's own, such as the address of a cluster.
    """

    jobs: int = 1
    device: str = "auto"
    perform: Callable[[Path], None] = field(default=lambda task: None, repr=False)
    options: Mapping[str, Any] = field(default_factory=dict)


ENGINES: Registry[Callable[[Order], Engine]] = Registry("engine")
