"""Worker processes on this machine: each does task after task, with CUDA on a GPU of its own.

A worker reads the directories of its tasks from a pipe. Whatever ends the driver closes the pipe, and a
worker that sees its end writes a checkpoint and leaves: none outlives its driver.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from archsearch import files
from archsearch.errors import UsageError
from archsearch.search.engines.child import WORKER, ending
from archsearch.search.engines.engine import Order
from archsearch.search.storage import hidden
from archsearch.search.task import RESULT
from archsearch.training.evaluation import resolve_device

COMMAND = (sys.executable, "-m", WORKER)
CLOSE_S = 30.0
"""How long a worker may take for its last checkpoint."""


class Local:
    """As many long-lived workers as jobs.

    Args:
        order: How many, and for which device.
        command: Starts a worker.
        gpus: The GPUs, as ``CUDA_VISIBLE_DEVICES`` would name them, by default those that this process sees.

    Raises:
        UsageError: If there is no such number of jobs.
    """

    def __init__(
        self, order: Order, command: Sequence[str] = COMMAND, gpus: Sequence[str] | None = None
    ) -> None:
        if order.jobs < 1:
            raise UsageError(f"--jobs {order.jobs}: at least 1")
        self.slots = order.jobs
        self.threads = fair_threads(order.jobs)
        chosen = visible_gpus(order.device) if gpus is None else list(gpus)
        self._workers = [
            _Worker(number, command, self.threads, chosen[number % len(chosen)] if chosen else None)
            for number in range(order.jobs)
        ]
        self._waiting: list[Path] = []
        self._endings: dict[Path, str] = {}

    def submit(self, task: Path) -> None:
        """Give the task to an idle worker, or keep it until there is one."""
        self._endings.pop(task, None)
        self._waiting.append(task)
        self._look()

    def ended(self, task: Path) -> str | None:
        """Return ``None`` while a task waits or runs, ``""`` when it is done, else how its worker died."""
        self._look()
        return self._endings.get(task)

    def cancel(self, task: Path) -> None:
        """Kill the worker of a task; the next task gets a new one."""
        if task in self._waiting:
            self._waiting.remove(task)
        for worker in self._workers:
            if worker.task == task:
                worker.kill()

    def close(self) -> None:
        """Let all workers write a checkpoint and end."""
        self._waiting.clear()
        for worker in self._workers:
            worker.dismiss()
        for worker in self._workers:
            worker.wait()

    def _look(self) -> None:
        """Note which tasks have ended, and give the waiting ones to who is idle."""
        for worker in self._workers:
            if worker.task is not None and (ending := worker.ended()) is not None:
                self._endings[worker.task] = ending
                worker.task = None
            if worker.task is None and self._waiting:
                worker.give(self._waiting.pop(0))


class _Worker:
    """One worker process, started with its first task and again after each death."""

    def __init__(self, number: int, command: Sequence[str], threads: int, gpu: str | None) -> None:
        self._number, self._command = number, list(command)
        self._log: Path | None = None
        self._changes = {"OMP_NUM_THREADS": str(threads)}
        if gpu is not None:
            self._changes["CUDA_VISIBLE_DEVICES"] = gpu
        self._process: subprocess.Popen[bytes] | None = None
        self.task: Path | None = None

    def give(self, task: Path) -> None:
        """Start a task."""
        self.task = task
        if self._process is None or self._process.poll() is not None:
            self._log = task.parent / f"worker-{self._number}.log"
            self._start(self._log)
        self._write(f"{task}\n")

    def ended(self) -> str | None:
        """Return ``None`` while it works, ``""`` when its task is done, else how it died in the middle."""
        if self.task is None or (self.task / RESULT).exists():
            return ""
        code = self._process.poll() if self._process is not None else 0
        if code is None:
            return None
        died = ending(code)
        return f"{died} (see {files.named(self._log)})" if self._log is not None else died

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def dismiss(self) -> None:
        """Close its pipe, which ends it after a checkpoint."""
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()

    def wait(self) -> None:
        """Wait until it has ended."""
        if self._process is not None:
            try:
                self._process.wait(CLOSE_S)
            except subprocess.TimeoutExpired:
                self.kill()

    def _start(self, log: Path) -> None:
        self.dismiss()
        with log.open("ab") as output, hidden():  # the environment is copied when the worker starts
            # A session of its own: Ctrl-C is the driver's, who then closes the pipe.
            self._process = subprocess.Popen(  # noqa: S603  our own module, and no user text
                self._command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env={**os.environ, **self._changes},
                start_new_session=True,
            )

    def _write(self, line: str) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it died: ``ended`` says so
                self._process.stdin.write(line.encode())
                self._process.stdin.flush()


def fair_threads(jobs: int) -> int:
    """Return the CPU threads of each of several workers: the user's number, or a fair share of the cores."""
    if "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    return max(1, len(os.sched_getaffinity(0)) // jobs)


def visible_gpus(device: str, count: Callable[[], int] = torch.cuda.device_count) -> list[str]:
    """Return the GPUs that workers share out, as ``CUDA_VISIBLE_DEVICES`` names them; none on the CPU.

    A single one that was asked for, such as ``cuda:1``, stays with all workers.
    """
    if str(resolve_device(device)) != "cuda":
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return [name for name in named.split(",") if name] or [str(index) for index in range(count())]
