"""Tasks of a search as tasks of Ray: on this machine, or on a cluster whose nodes see the same files.

Ray only finds a free place and starts a process there (``child`` does the rest). Its own retries are off:
what was lost is the driver's to start again, who counts and says so.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from archsearch.errors import StorageError, UsageError
from archsearch.search.engines.child import carry_out
from archsearch.search.engines.engine import Order
from archsearch.search.engines.resources import Resources
from archsearch.search.storage import hidden

LOCAL = "local"
CLOSE_S = 30.0


class RayEngine:
    """Hands each task to Ray with the CPUs and GPUs that it needs.

    Args:
        order: ``jobs`` tasks are submitted at once; of ``options``, ``address`` names the cluster (``auto``
            is the one of this machine), by default ``$RAY_ADDRESS`` or else a new one on this machine alone,
            and ``cpus`` and ``gpus`` are what a task needs.
        work: Does the task of a directory on a node, with so many processes and threads; returns ``""``, or
            how its worker died.

    Raises:
        UsageError: If Ray is missing.
        StorageError: If the cluster cannot be reached.
    """

    def __init__(self, order: Order, work: Callable[[str, int, int], str] = carry_out) -> None:
        self._ray = _imported()
        self._needs = Resources.of(order)
        self.slots, self.threads = self._needs.jobs, self._needs.cpus
        address = order.options.get("address") or os.environ.get("RAY_ADDRESS") or LOCAL
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if address == LOCAL:
            options |= {"num_cpus": self.slots * self._needs.cpus, "include_dashboard": False}
        self._is_mine = not self._ray.is_initialized()
        if self._is_mine:
            try:
                with hidden(), same_sigterm():  # the workers of a new Ray inherit this environment
                    self._ray.init(address=address, **options)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise StorageError(
                    f"--address {address}: no Ray cluster answers there ({str(error).splitlines()[0]}): "
                    "start one with 'ray start --head', or leave --address out"
                ) from error
        self._work = self._ray.remote(num_cpus=self._needs.cpus, num_gpus=self._needs.gpus, max_retries=0)(
            work
        )
        self._tasks: dict[Path, Any] = {}

    def submit(self, task: Path) -> None:
        """Queue a task; Ray starts it where there is room."""
        self._tasks[task] = self._work.remote(str(task.resolve()), self._needs.processes, self._needs.cpus)

    def ended(self, task: Path) -> str | None:
        """Return ``None`` while a task waits or runs, ``""`` when its worker ended, else why it was lost."""
        place = self._tasks.get(task)
        if place is None:
            return "was never started"
        ready, _ = self._ray.wait([place], timeout=0)
        if not ready:
            return None
        try:
            return str(self._ray.get(place))
        except self._ray.exceptions.RayError as error:
            return f"was lost: {type(error).__name__}: {_first_line(error)}"

    def cancel(self, task: Path) -> None:
        """Kill the process that waits for the worker; the kernel then ends the worker."""
        if (place := self._tasks.get(task)) is not None:
            self._ray.cancel(place, force=True)

    def close(self) -> None:
        """Let all workers write a checkpoint and end; leave the cluster."""
        running = [place for task, place in self._tasks.items() if self.ended(task) is None]
        for place in running:
            self._ray.cancel(place, force=False)  # a KeyboardInterrupt, which ``child`` passes on
        if running:
            self._ray.wait(running, num_returns=len(running), timeout=CLOSE_S)
        self._tasks.clear()
        if self._is_mine:
            self._ray.shutdown()


def _imported() -> Any:
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise UsageError("--engine ray needs Ray: pip install 'archsearch[ray]'") from error
    return ray


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")[:200]


@contextlib.contextmanager
def same_sigterm() -> Iterator[None]:
    """Keep what this process does at SIGTERM: a new Ray would have it end on the spot, with nothing saved."""
    if threading.current_thread() is not threading.main_thread():  # where handlers cannot be set
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
