"""A search in processes of its own, some of which are killed in the middle."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import optuna
import pytest
from find_case import ENVIRONMENT, FACTORY

from archsearch.search.task import read_progress

TRIALS = 6
SEARCH = [
    *(sys.executable, "-m", "archsearch.cli", "search", "--model", FACTORY, "--trust-code"),
    *("--argument", "in_channels=1", "--data", "digits", "--flops", "0.5", "--trials", str(TRIALS)),
    *(
        "--jobs",
        "2",
        "--objective",
        "full",
        "--epochs",
        "15",
        "--train-share",
        "0.3",
        "--finals",
        "2",
        "--device",
        "cpu",
    ),
]


def command(directory: Path, *more: str) -> list[str]:
    return [*SEARCH, *more, "--store", str(directory / "store"), "--out", str(directory / "out")]


def until(condition: Callable[[], object], process: subprocess.Popen[Any]) -> None:
    end_s = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < end_s
        time.sleep(0.02)


def workers_of(pid: int) -> list[int]:
    """Return the children of a process that are workers."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [
        int(child)
        for child in children
        if b"archsearch.search.worker" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


def descendants(pid: int) -> Iterator[int]:
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # it has just ended
            for child in map(int, children.read_text().split()):
                yield child
                yield from descendants(child)


def program(pid: int) -> str:
    """Return what a process runs, ``""`` if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
    except OSError:
        return ""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def trials(directory: Path) -> list[optuna.trial.FrozenTrial]:
    storage = optuna.storages.RDBStorage(f"sqlite:///{directory / 'out' / 'study.db'}")
    found = optuna.load_study(study_name="search", storage=storage).get_trials()
    storage.engine.dispose()
    return found


def in_the_middle(tasks: Path) -> bool:
    """Return whether a task is between its first epoch and its result."""
    begun = [task for task in tasks.glob("0*") if read_progress(task)]
    return any(not (task / "result.json").exists() for task in begun)


def killed_in_the_middle(workers: Sequence[int], tasks: Path) -> bool:
    """Hold all workers; kill them if a task is between its first epoch and its result."""
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    middle = in_the_middle(tasks)
    for pid in workers:
        os.kill(pid, signal.SIGKILL if middle else signal.SIGCONT)
    return middle


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for the workers in /proc")
def test_neither_a_killed_worker_nor_a_killed_driver_costs_a_trial(tmp_path: Path) -> None:
    killed, tasks = tmp_path / "killed", tmp_path / "killed" / "out" / "tasks"
    with subprocess.Popen(command(killed), stderr=subprocess.PIPE, env=ENVIRONMENT) as driver:
        # The workers die in the middle of a training: their tasks go on with others.
        until(lambda: killed_in_the_middle(workers_of(driver.pid), tasks), driver)
        # The driver dies with some trials told and others in flight: its workers go with it.
        until(lambda: len(list(tasks.glob("*/result.json"))) >= 3, driver)
        workers = workers_of(driver.pid)
        os.kill(driver.pid, signal.SIGKILL)
        assert driver.wait() == -signal.SIGKILL
        assert driver.stderr is not None
        said = driver.stderr.read().decode()
    assert "was killed by signal 9 (see " in said
    assert "): started again from its checkpoint" in said
    end_s = time.monotonic() + 120
    while any(map(is_alive, workers)):
        assert time.monotonic() < end_s
        time.sleep(0.05)
    assert_it_goes_on(killed, command(killed))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="the extra 'ray' is not installed")
def test_a_killed_driver_of_workers_of_ray_costs_no_trial(tmp_path: Path) -> None:
    """Its Ray, which it had started, goes with it; workers that do not are waited for by the next ones."""
    again = command(tmp_path, "--engine", "ray")
    # By default Ray's workers give way to all others, and on a busy machine would hardly start.
    environment = {**ENVIRONMENT, "RAY_worker_niceness": "0"}
    tasks = tmp_path / "out" / "tasks"
    with subprocess.Popen(again, stderr=subprocess.DEVNULL, env=environment) as driver:
        until(lambda: len(list(tasks.glob("*/result.json"))) >= 2 and in_the_middle(tasks), driver)
        os.kill(driver.pid, signal.SIGKILL)
        assert driver.wait() == -signal.SIGKILL
    assert_it_goes_on(tmp_path, again, environment)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="the extra 'ray' is not installed")
@pytest.mark.parametrize("victim", ["raylet", "gcs_server"])
def test_a_killed_ray_ends_the_driver_with_an_error_and_costs_no_trial(tmp_path: Path, victim: str) -> None:
    """Neither its node nor its head tells the driver that it is gone; the driver sees it by itself."""
    again = command(tmp_path, "--engine", "ray")
    environment = {**ENVIRONMENT, "RAY_worker_niceness": "0"}
    tasks = tmp_path / "out" / "tasks"
    with subprocess.Popen(again, stderr=subprocess.PIPE, text=True, env=environment) as driver:
        until(lambda: len(list(tasks.glob("*/result.json"))) >= 2 and in_the_middle(tasks), driver)
        family = list(descendants(driver.pid))
        try:
            os.kill(next(pid for pid in family if program(pid).endswith(f"/{victim}")), signal.SIGKILL)
            said = driver.communicate(timeout=300)[1]
            assert driver.returncode == 5, said
            told = "".join(line for line in said.splitlines() if "error: Ray has died (" in line)
            assert told.endswith("nothing that has finished is lost, and the same command goes on"), said
            end_s = time.monotonic() + 120
            while any(map(is_alive, family)):
                assert time.monotonic() < end_s, [program(pid) for pid in family if is_alive(pid)]
                time.sleep(0.05)
        finally:
            driver.kill()
            for pid in filter(is_alive, family):
                os.kill(pid, signal.SIGKILL)
    assert_it_goes_on(tmp_path, again, environment)


def assert_it_goes_on(
    killed: Path, again: Sequence[str], environment: Mapping[str, str] = ENVIRONMENT
) -> None:
    """Assert that the same command ends a search whose driver is dead, and trains nothing twice."""
    status = [sys.executable, "-m", "archsearch.cli", "search", "status", str(killed / "out")]
    shown = subprocess.run(status, env=ENVIRONMENT, check=True, capture_output=True, text=True).stdout
    assert " interrupted" in shown and " running" not in shown
    assert "no driver is at work: the same command goes on" in shown
    told = {t.number: t.value for t in trials(killed) if t.state.name == "COMPLETE"}
    finished = {path: path.stat().st_mtime_ns for path in killed.rglob("store/trainings/*/result.json")}
    assert told and len(finished) < TRIALS

    assert subprocess.run(again, env=environment, check=False).returncode == 0
    after = trials(killed)
    assert [t.state.name for t in after] == ["COMPLETE"] * TRIALS
    assert all(after[number].value == value for number, value in told.items())
    # Nothing that was trained is trained again, and nothing is trained twice.
    assert all(path.stat().st_mtime_ns == written for path, written in finished.items())

    # A resumed training counts all its epochs, and no two trials have trained the same thing.
    assert {t.user_attrs["epochs"] for t in after} == {15}
    trained = [t.user_attrs["training"] for t in after if "same_as" not in t.user_attrs]
    assert (
        len(trained)
        == len(set(trained))
        == len({(t.user_attrs["widths"], t.user_attrs["seed"]) for t in after})
    )
