"""Tasks of a search as tasks of Ray: on this machine, or on a cluster whose nodes see the same files.

Ray only finds a free place and starts a process there (``child`` does the rest). Its own retries are off:
what was lost is the driver's to start again, who counts and says so.

Ray does not say that it has died itself. Tasks of a driver whose node was killed seem to run for ever, and
a driver whose cluster has lost its head is ended after a minute, in the middle of whatever it does. So the
engine looks for itself whether these two still answer, by connections that Ray knows nothing of.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import threading
import time
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
LOOK_EVERY_S = 2.0
"""Pause between two looks at whether Ray is alive."""
SILENCE_S = 5.0
"""Who has not answered for so long is dead; far below the minute after which Ray ends the process."""
CONNECT_S = 1.0


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
        again = "the same command goes on" if address == LOCAL else "the same command goes on with a new Ray"
        self._died = f"Ray has died ({{}}): nothing that has finished is lost, and {again}"
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
        self._lifelines = _lifelines(self._ray, address)
        self._looked_at_s = time.monotonic()
        self._tasks: dict[Path, Any] = {}

    def submit(self, task: Path) -> None:
        """Queue a task; Ray starts it where there is room.

        Raises:
            StorageError: If Ray has died.
        """
        self._check()  # the first task of a driver would wait for a dead head
        self._tasks[task] = self._work.remote(str(task.resolve()), self._needs.processes, self._needs.cpus)

    def ended(self, task: Path) -> str | None:
        """Return ``None`` while a task waits or runs, ``""`` when its worker ended, else why it was lost.

        Raises:
            StorageError: If Ray has died.
        """
        place = self._tasks.get(task)
        if place is None:
            return "was never started"
        if time.monotonic() - self._looked_at_s > LOOK_EVERY_S:
            self._check()
        ready, _ = self._ray.wait([place], timeout=0)
        if not ready:
            return None
        try:
            return str(self._ray.get(place))
        except self._ray.exceptions.RayError as error:
            self._check()  # the workers of a dead node end, too: another start would be in vain
            return f"was lost: {type(error).__name__}: {_first_line(error)}"

    def cancel(self, task: Path) -> None:
        """Kill the process that waits for the worker; the kernel then ends the worker."""
        if (place := self._tasks.get(task)) is not None:
            self._ray.cancel(place, force=True)

    def close(self) -> None:
        """Let all workers write a checkpoint and end; leave the cluster, which may be dead.

        Where it is, the kernel has told the workers already, whose processes end with it.
        """
        if self._silent() is None:
            _in_time(self._dismiss, 2 * CLOSE_S)
        self._tasks.clear()
        if self._is_mine and not _in_time(self._ray.shutdown, CLOSE_S):
            atexit.unregister(self._ray.shutdown)  # which would not end there, either

    def _dismiss(self) -> None:
        running = [place for place in self._tasks.values() if not self._ray.wait([place], timeout=0)[0]]
        for place in running:
            self._ray.cancel(place, force=False)  # a KeyboardInterrupt, which ``child`` passes on
        if running:
            self._ray.wait(running, num_returns=len(running), timeout=CLOSE_S)

    def _silent(self) -> str | None:
        """Return who of those that this process hangs on takes no connection."""
        for name, place in self._lifelines.items():
            try:
                socket.create_connection(place, timeout=CONNECT_S).close()
            except OSError:
                return f"{name} at {place[0]}:{place[1]} does not answer"
        return None

    def _check(self) -> None:
        """Raise a StorageError if Ray has died; a head that is started again at once has not."""
        deadline_s = time.monotonic() + SILENCE_S
        while (silent := self._silent()) is not None:
            if time.monotonic() > deadline_s:
                raise StorageError(self._died.format(silent))
            time.sleep(CONNECT_S)
        self._looked_at_s = time.monotonic()


def _lifelines(ray: Any, address: str) -> dict[str, tuple[str, int]]:
    """Return the host and port of each process of Ray's without which nothing comes back to this one."""
    if address.startswith("ray://"):  # whose server is all that the client sees
        return {"its server": _place(address.removeprefix("ray://"))}
    here = ray.get_runtime_context()
    node = next(node for node in ray.nodes() if node["NodeID"] == here.get_node_id())
    return {
        "the head of its cluster": _place(here.gcs_address),
        "its node on this machine": (node["NodeManagerAddress"], node["NodeManagerPort"]),
    }


def _place(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _in_time(action: Callable[[], object], limit_s: float) -> bool:
    """Do something that may never end; return whether it has. If not, it is left to a thread of its own."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(limit_s)
    return not thread.is_alive()


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
