"""Tasks of a search as jobs of a SLURM cluster, through submitit.

A job gets the path of its task and nothing else. submitit pickles this call into the task's own directory
and its job reads it from there: both are the same user's processes, and no result comes back that way. What
is pickled is a class's name, a path and two numbers; the result is the ``result.json`` of the worker.

The number of the job stands beside the task, so a driver that starts again finds its jobs, queued or
running, and waits for them. A job that is preempted or out of time writes a checkpoint and is queued again
by submitit under the same number.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from archsearch import files
from archsearch.errors import ResourceError, StorageError, UsageError
from archsearch.search.engines.child import LOG, Child
from archsearch.search.engines.engine import Order
from archsearch.search.engines.resources import Resources
from archsearch.search.storage import hidden
from archsearch.search.task import RESULT

FOLDER, JOB = "slurm", "job.json"
CLUSTERS = ("slurm", "local")
DEFAULTS: Mapping[str, Any] = {"name": "archsearch", "timeout_min": 240, "nodes": 1, "tasks_per_node": 1}
LOOK_S = 30.0
"""How often SLURM is asked for the state of all jobs; a job's end is seen by its files at once."""


class SlurmEngine:
    """Submits each task as a job.

    Args:
        order: ``jobs`` jobs are in the queue or running at once; of ``options``, ``cpus`` and ``gpus`` are
            what a task needs, and ``slurm`` holds parameters of submitit by name, such as ``partition``,
            ``account`` or ``timeout_min``. ``cluster`` ``local`` among them runs jobs on this machine.

    Raises:
        UsageError: If submitit or SLURM is missing, or a parameter is unknown.
    """

    def __init__(self, order: Order) -> None:
        self._submitit = _imported()
        self._needs = Resources.of(order)
        self.slots, self.threads = self._needs.jobs, self._needs.cpus
        given = dict(order.options.get("slurm") or {})
        self._cluster = given.pop("cluster", "slurm")
        if self._cluster not in CLUSTERS:
            raise UsageError(f"--slurm cluster={self._cluster}: give {' or '.join(CLUSTERS)}")
        shared = self._submitit.AutoExecutor._typed_parameters()
        self._parameters = {
            **DEFAULTS,
            "cpus_per_task": self._needs.cpus,
            "gpus_per_node": self._needs.gpus,
            **{
                (name if name in shared or name.startswith("slurm_") else f"slurm_{name}"): _plain(value)
                for name, value in given.items()
            },
        }
        self._executor(Path("slurm"))  # a wrong parameter is told before anything is trained
        self._jobs: dict[Path, Any] = {}
        self._looked_s = time.monotonic()

    def submit(self, task: Path) -> None:
        """Submit a task, or find the job of an earlier driver that has it."""
        earlier = self._found(task)
        self._jobs[task] = earlier or self._submitted(task)

    def ended(self, task: Path) -> str | None:
        """Return ``None`` while a job waits or runs, ``""`` when its worker ended, else why it was lost."""
        job = self._jobs.get(task)
        if job is None:
            return "was never started"
        if self._is_alive(job):
            return None
        task.chmod(task.stat().st_mode)  # a network file system shows new files after a change of ours
        if (task / RESULT).exists():
            return ""
        if job.paths.result_pickle.exists():
            return f"ended without a result (job {job.job_id}; see {files.named(task / LOG)})"
        return f"was lost (job {job.job_id} is {job.state}; see {files.named(job.paths.stderr)})"

    def cancel(self, task: Path) -> None:
        """Take the job out of the queue, or kill it."""
        job = self._jobs.get(task) or self._found(task)
        if job is not None and self._is_alive(job):
            if self._cluster == "local":
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(int(job.job_id), signal.SIGINT)
            else:
                job.cancel(check=False)
        (task / JOB).unlink(missing_ok=True)  # SLURM may call it alive for a while

    def close(self) -> None:
        """Cancel what is in the queue or running; checkpoints stay."""
        for task, job in self._jobs.items():
            self.cancel(task)
            if self._cluster == "local":
                job.wait()  # for a child of this process
        self._jobs.clear()

    def _submitted(self, task: Path) -> Any:
        try:
            with hidden():  # sbatch keeps the environment of whoever calls it
                job = self._executor(task / FOLDER).submit(
                    Attempt(), str(task.resolve()), self._needs.processes, self._needs.cpus
                )
        except (OSError, self._submitit.core.utils.FailedJobError) as error:
            raise ResourceError(f"{files.named(task)}: SLURM takes no job: {_last_line(error)}") from error
        files.write_json(task / JOB, {"cluster": self._cluster, "job": job.job_id})
        return job

    def _found(self, task: Path) -> Any | None:
        path = task / JOB
        if not path.exists():
            return None
        data = files.read_json(path, StorageError)
        if not isinstance(data, dict) or not str(data.get("job", "")).replace("_", "").isdigit():
            raise StorageError(f"{files.named(path)}: names no job: delete this file")
        if data.get("cluster") != self._cluster:
            return None
        folder = (task / FOLDER).resolve()
        job = _job_class(self._cluster)(folder=folder, job_id=str(data["job"]))
        return job if self._is_alive(job) else None

    def _is_alive(self, job: Any) -> bool:
        if job.paths.result_pickle.exists():
            return False
        if self._cluster == "local":
            return _is_controller(int(job.job_id), job)
        force = time.monotonic() - self._looked_s > LOOK_S
        if force:
            self._looked_s = time.monotonic()
        return not job.done(force_check=force)

    def _executor(self, folder: Path) -> Any:
        try:
            executor = self._submitit.AutoExecutor(
                folder=folder,
                cluster=self._cluster,
                # Trainings go on from checkpoints: each may run out of time as often as it must.
                slurm_max_num_timeout=1000,
            )
            executor.update_parameters(**self._parameters)
        except (NameError, AssertionError, ValueError, TypeError) as error:
            raise UsageError(f"--slurm: {' '.join(str(error).split())[:400]}") from error
        except RuntimeError as error:
            raise UsageError(
                f"--engine slurm: {' '.join(str(error).split())[:200]}: run this where sbatch and srun are, "
                "or try it out with --slurm cluster=local"
            ) from error
        return executor


class Attempt:
    """What a job does: it starts the worker of a task and waits for it.

    submitit calls ``checkpoint`` when the job is preempted or nearly out of time.
    """

    def __init__(self) -> None:
        self._child: Child | None = None

    def __call__(self, task: str, processes: int, threads: int) -> str:
        """Do the task; return ``""``, or how the worker died."""
        with Child(Path(task), processes, threads) as self._child:
            return self._child.wait()

    def checkpoint(self, task: str, processes: int, threads: int) -> Any:
        """Have the worker write a checkpoint; return the same call, to be queued again."""
        if self._child is not None:
            self._child.leave()
        return _imported().helpers.DelayedSubmission(Attempt(), task, processes, threads)


def _imported() -> Any:
    try:
        import submitit
        import submitit.helpers
    except ImportError as error:
        raise UsageError("--engine slurm needs submitit: pip install 'archsearch[slurm]'") from error
    return submitit


def _job_class(cluster: str) -> Any:
    return _imported().LocalJob if cluster == "local" else _imported().SlurmJob


def _is_controller(process: int, job: Any) -> bool:
    """Return whether a process is that of a job on this machine, and not a later one of the same number."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return str(job.paths.folder).encode() in words


def _plain(value: object) -> object:
    """Return a parameter as submitit expects it: numbers as numbers."""
    text = str(value)
    return int(text) if text.isdigit() else value


def _last_line(error: Exception) -> str:
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "no message")
