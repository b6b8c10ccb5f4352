from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from engine_case import accuracy_of, until, write_task

from archsearch.search.engines import child
from archsearch.search.engines.child import Child, carry_out
from archsearch.search.task import STOP, Result

POLITE = """
import pathlib, signal, sys, time
place = pathlib.Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: (place.joinpath("checkpoint").touch(), sys.exit(75)))
place.joinpath("started").touch()
time.sleep(120)
"""
"""Stands in for a worker that is in the middle of a training."""


def does(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(child, "command", lambda task, processes: [sys.executable, "-c", code, str(task)])


@pytest.mark.parametrize(
    ("code", "ending"),
    [
        ("print('done')", ""),
        ("raise SystemExit(3)", "ended with exit code 3"),
        ("import os; os.kill(os.getpid(), 9)", "was killed by signal 9"),
    ],
)
def test_how_a_worker_ended_is_told_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, ending: str
) -> None:
    does(monkeypatch, code)
    assert carry_out(str(tmp_path)) == ending
    assert (tmp_path / "worker.log").read_text() == ("done\n" if not ending else "")


def test_a_worker_that_is_interrupted_may_write_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    does(monkeypatch, POLITE)

    def interrupt() -> None:
        with Child(tmp_path):
            until((tmp_path / "started").exists, "the worker")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert (tmp_path / "checkpoint").exists()


def test_leaving_works_in_a_signal_handler_while_the_worker_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    does(monkeypatch, POLITE)
    with Child(tmp_path) as worker:
        until((tmp_path / "started").exists, "the worker")
        before = signal.signal(signal.SIGALRM, lambda *_: worker.leave())
        signal.alarm(1)
        try:
            assert worker.wait() == "ended with exit code 75"
        finally:
            signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal at a parent's death is Linux's")
def test_a_worker_leaves_when_the_process_that_waits_for_it_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys; from archsearch.search.engines import child; "
        f"child.command = lambda task, processes: [sys.executable, '-c', {POLITE!r}, str(task)]; "
        f"child.carry_out({str(tmp_path)!r})"
    )
    waiting = subprocess.Popen([sys.executable, "-c", program])
    until(lambda: (tmp_path / "started").exists() or waiting.poll() is not None, "the worker")
    os.kill(waiting.pid, signal.SIGKILL)
    waiting.wait()
    until((tmp_path / "checkpoint").exists, "the checkpoint of the worker")


@pytest.mark.slow
def test_a_task_with_two_processes_is_trained_data_parallel(tmp_path: Path) -> None:
    task = write_task(tmp_path / "tasks" / "00000", tmp_path / "store", epochs=2, batch_size=128)
    start_s = time.monotonic()
    ending = carry_out(str(task), processes=2)
    assert ending == "", (task / "worker.log").read_text()
    assert time.monotonic() - start_s < 300
    accuracy_of(task)
    (description,) = (tmp_path / "store").glob("trainings/*/training.json")
    assert json.loads(description.read_text())["processes"] == 2


@pytest.mark.slow
def test_a_task_with_two_processes_is_stopped_early_by_all_of_them(tmp_path: Path) -> None:
    """The file is there before the first epoch ends, whichever process looks first."""
    task = write_task(tmp_path / "tasks" / "00000", tmp_path / "store", epochs=50, batch_size=128)
    (task / STOP).touch()
    assert carry_out(str(task), processes=2) == "", (task / "worker.log").read_text()
    result = Result.read(task)
    assert result is not None
    assert (result.stopped, result.epochs, result.error) == (2, 1, None)
    assert list((tmp_path / "store").rglob("checkpoints/*")), "it may go on another time"
