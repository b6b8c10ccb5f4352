"""One worker process for one task, where a cluster's own process stands between the driver and the work.

Ray and submitit start a process on the right machine with the right GPUs visible. That process only starts
the worker and waits, so that a task sees a clean interpreter, may be spread over several GPUs by torchrun,
and gets a signal when its time is over: the worker then writes a checkpoint and leaves. Whatever kills the
waiting process has the kernel send that signal.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Final

WORKER: Final = "archsearch.search.worker"
LOG: Final = "worker.log"
POLL_S: Final = 0.1
LEAVE_S: Final = 60.0
"""How long a worker may take for its last checkpoint."""

_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>, which survives exec
_TETHER = f"""
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl({_PARENT_DEATH_SIGNAL}, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the process that started this one is dead")
os.execv(sys.argv[2], sys.argv[2:])
"""


class Child:
    """The worker process of a task; a context that ends it.

    Args:
        task: Directory of the task, which also gets the worker's log.
        processes: Of the data-parallel training; with more than one, torchrun starts them.
        threads: CPU threads of each process.
    """

    def __init__(self, task: Path, processes: int = 1, threads: int = 1) -> None:
        with (task / LOG).open("ab") as log:
            # A session of its own: what a cluster sends to the waiting process's group is not for the worker.
            self._process = subprocess.Popen(  # noqa: S603  our own module, and no user text
                [sys.executable, "-c", _TETHER, str(os.getpid()), *command(task, processes)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                start_new_session=True,
            )

    def __enter__(self) -> Child:  # noqa: PYI034  # typing.Self is Python 3.11
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()
        self._process.wait()

    def wait(self) -> str:
        """Wait until the worker has ended; return ``""``, or how it died."""
        # Not by Popen.wait, which holds a lock that ``leave``, called by a signal's handler, would wait for.
        while not self._has_ended():
            time.sleep(POLL_S)
        code = self._process.wait()
        return "" if code == 0 else ending(code)

    def leave(self) -> None:
        """Have the worker write a checkpoint and end; may be called from a signal's handler."""
        deadline_s = time.monotonic() + LEAVE_S
        self._signal(signal.SIGTERM)
        while not self._has_ended() and time.monotonic() < deadline_s:
            time.sleep(POLL_S)
        self._signal(signal.SIGKILL)

    def _has_ended(self) -> bool:
        if self._process.returncode is not None:
            return True
        try:
            options = os.WEXITED | os.WNOHANG | os.WNOWAIT
            return os.waitid(os.P_PID, self._process.pid, options) is not None
        except ChildProcessError:  # somebody else has collected it
            return True

    def _signal(self, number: signal.Signals) -> None:
        if not self._has_ended():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)


def ending(code: int) -> str:
    """Return how a process with an exit code of ``subprocess`` died."""
    return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"


def command(task: Path, processes: int) -> list[str]:
    """Return what does a task, its program as an absolute path."""
    if processes == 1:
        return [sys.executable, "-m", WORKER, str(task)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, f"--nproc-per-node={processes}", "-m", WORKER, str(task)]


def carry_out(task: str, processes: int = 1, threads: int = 1) -> str:
    """Do a task in a worker process here; return ``""``, or how the worker died."""
    with Child(Path(task), processes, threads) as child:
        return child.wait()
