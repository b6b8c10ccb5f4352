from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from archsearch.catalogue import CATALOGUES
from archsearch.errors import UnknownNameError, UsageError
from archsearch.search.crew import Crew
from archsearch.search.engines import ENGINES, Order
from archsearch.search.engines.inline import Inline
from archsearch.search.engines.local import Local, fair_threads, visible_gpus

# Stands in for a worker: says what it was given and does the task, unless it is to wait for ever.
WORKER = """
import os, pathlib, sys, time
for line in sys.stdin:
    task = pathlib.Path(line.rstrip())
    names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
    (task / "seen").write_text(" ".join([str(os.getpid()), *(os.environ.get(name, "-") for name in names)]))
    while (task / "wait").exists():
        time.sleep(0.01)
    (task / "result.json").write_text("{}")
"""
COMMAND = (sys.executable, "-S", "-c", WORKER)


def until(condition: Callable[[], object]) -> None:
    end_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def new_task(directory: Path, number: int, *, waits: bool = False) -> Path:
    task = directory / f"{number:05d}"
    task.mkdir()
    if waits:
        (task / "wait").touch()
    return task


def seen(task: Path) -> list[str]:
    until(lambda: (task / "seen").exists() and (task / "seen").read_text())
    return (task / "seen").read_text().split()


def log_of(task: Path) -> Path:
    """Return what the first worker says."""
    return task.parent / "worker-0.log"


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def engine() -> Iterator[Local]:
    made = Local(Order(jobs=2, device="cpu"), COMMAND, gpus=["3", "5"])
    yield made
    made.close()


def test_workers_share_out_tasks_gpus_and_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    assert [fair_threads(jobs) for jobs in (1, cores, 10 * cores)] == [cores, 1, 1]
    engine = Local(Order(jobs=2, device="cpu"), COMMAND, gpus=["3", "5"])
    assert engine.slots == 2
    tasks = [new_task(tmp_path, number, waits=number < 2) for number in range(3)]
    for task in tasks:
        engine.submit(task)
    threads = str(max(1, cores // 2))
    assert [seen(task)[1:] for task in tasks[:2]] == [["3", threads], ["5", threads]]
    assert [engine.ended(task) for task in tasks] == [None, None, None]
    assert not (tasks[2] / "seen").exists()
    (tasks[0] / "wait").unlink()
    until(lambda: engine.ended(tasks[2]) == "")
    assert seen(tasks[2]) == seen(tasks[0])
    assert (engine.ended(tasks[0]), engine.ended(tasks[1])) == ("", None)
    (tasks[1] / "wait").unlink()
    until(lambda: engine.ended(tasks[1]) == "")
    engine.close()
    assert not any(is_alive(int(seen(task)[0])) for task in tasks)


def test_the_users_number_of_threads_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert fair_threads(2) == torch.get_num_threads()


def test_a_killed_worker_is_told_and_the_next_task_gets_a_new_one(tmp_path: Path, engine: Local) -> None:
    task = new_task(tmp_path, 0, waits=True)
    engine.submit(task)
    os.kill(int(seen(task)[0]), signal.SIGKILL)
    until(lambda: engine.ended(task) == f"was killed by signal 9 (see {log_of(task)})")
    (task / "wait").unlink()
    engine.submit(task)
    until(lambda: engine.ended(task) == "")


def test_a_worker_that_cannot_start_is_told(tmp_path: Path) -> None:
    engine = Local(Order(device="cpu"), (sys.executable, "-c", "raise SystemExit(3)"))
    task = new_task(tmp_path, 0)
    engine.submit(task)
    until(lambda: engine.ended(task) == f"ended with exit code 3 (see {log_of(task)})")
    engine.close()


def test_a_cancelled_task_ends_at_once(tmp_path: Path, engine: Local) -> None:
    running = [new_task(tmp_path, number, waits=True) for number in range(2)]
    waiting = new_task(tmp_path, 2)
    for task in (*running, waiting):
        engine.submit(task)
    engine.cancel(waiting)
    pid = int(seen(running[0])[0])
    engine.cancel(running[0])
    assert not is_alive(pid)
    assert engine.ended(running[0]) == f"was killed by signal 9 (see {log_of(running[0])})"
    engine.cancel(running[1])
    assert not (waiting / "seen").exists()


def test_no_worker_gets_the_address_of_the_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHSEARCH_STORAGE", "postgresql://user:secret@host/studies")
    engine = Local(Order(device="cpu"), ("sh", "-c", "env; exec cat"))
    engine.submit(new_task(tmp_path, 0))
    log = tmp_path / "worker-0.log"
    until(lambda: log.exists() and "OMP_NUM_THREADS" in log.read_text())
    engine.close()
    assert "secret" not in log.read_text()
    assert "secret" in os.environ["ARCHSEARCH_STORAGE"]


def test_no_worker_outlives_its_engine(tmp_path: Path) -> None:
    engine = Local(Order(device="cpu"), ("sh", "-c", "echo $$; exec cat"))
    task = new_task(tmp_path, 0)
    engine.submit(task)
    log = tmp_path / "worker-0.log"
    until(lambda: log.exists() and log.read_text().endswith("\n"))
    pid = int(log.read_text().splitlines()[0])
    assert is_alive(pid)
    engine.close()
    assert not is_alive(pid)


def test_workers_see_one_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus("cuda", lambda: 2) == ["0", "1"]
    assert visible_gpus("auto", lambda: 2) == ["0", "1"]
    assert visible_gpus("cuda:1", lambda: 2) == []
    assert visible_gpus("cpu", lambda: 2) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5e")
    assert visible_gpus("cuda", lambda: 2) == ["4", "GPU-5e"]


def test_a_task_inline_is_done_when_it_is_submitted(tmp_path: Path) -> None:
    done: list[Path] = []
    engine = Inline(Order(perform=done.append))
    engine.submit(tmp_path)
    assert (done, engine.ended(tmp_path), engine.slots) == ([tmp_path], "", 1)
    with pytest.raises(UsageError, match="--engine inline --jobs 2"):
        Inline(Order(jobs=2))


def test_the_number_of_jobs_chooses_the_engine() -> None:
    assert [Crew(jobs).name for jobs in (1, 2)] == ["inline", "local"]
    assert Crew(2, "ray").name == "ray"
    with pytest.raises(UsageError, match="--jobs 0"):
        Crew(0)
    with pytest.raises(UnknownNameError, match="locl"):
        Crew(2, "locl")


def test_engines_are_listed_and_clusters_are_not_imported_for_that() -> None:
    lines = list(CATALOGUES["engines"]("*"))
    assert [line.split()[0] for line in lines] == ["inline", "local", "ray", "slurm"] == list(ENGINES)
    assert all(len(line.split()) > 3 for line in lines)
