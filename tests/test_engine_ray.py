from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_case import accuracy_of, by_hand, epochs, until, write_task

from archsearch.errors import StorageError, UsageError
from archsearch.search.crew import Crew
from archsearch.search.engines import ENGINES, Order
from archsearch.search.engines import ray as ray_engine
from archsearch.search.engines.ray import RayEngine, same_sigterm

ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed")
# Ray keeps sockets and child processes until its interpreter ends.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning")


def order(jobs: int = 1, device: str = "cpu", **options: object) -> Order:
    return Order(jobs=jobs, device=device, options=options)


def _stub() -> Callable[[str, int, int], str]:
    # Inside another function, so that Ray's workers need not import this module and all that it imports.
    def stub(task: str, processes: int, threads: int) -> str:
        """Write who does the task, and do nothing until a file tells how to end."""
        import os
        import time
        from pathlib import Path

        place = Path(task)
        try:
            (place / "process").write_text(f"{os.getpid()} {processes} {threads}")
            while not (place / "go").exists():
                time.sleep(0.02)
        except KeyboardInterrupt:
            (place / "left").touch()
            return "was asked to leave"
        return (place / "go").read_text()

    return stub


stub = _stub()


def task_in(directory: Path, name: str) -> Path:
    task = directory / "tasks" / name
    task.mkdir(parents=True)
    return task


def process_of(task: Path) -> int:
    until(lambda: (task / "process").exists() and (task / "process").read_text(), f"the start of {task}")
    return int((task / "process").read_text().split()[0])


# ----------------------------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("crew", "message"),
    [
        ({"jobs": 2, "options": {"gpus": 1}}, "--gpus-per-task: is for --engine ray or slurm, not local"),
        ({"engine": "slurm", "options": {"address": "auto"}}, "--address: is for --engine ray, not slurm"),
        ({"options": {"slurm": {"partition": "gpu"}}}, "--slurm: is for --engine slurm, not inline"),
    ],
)
def test_an_option_of_another_engine_is_refused(crew: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Crew(**crew)


def test_without_ray_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"archsearch\[ray\]"):
        ENGINES["ray"](order())


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (order(gpus=1), "--gpus-per-task 1: with --device cpu"),
        (order(device="cuda"), "--device cuda: .*--gpus-per-task 1"),
        (order(cpus=-2), "--cpus-per-task -2: at least 1"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_before_ray_starts(asked: Order, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ENGINES["ray"](asked)
    assert not ray.is_initialized()


def test_an_address_where_no_cluster_answers_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: object) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nmore")

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(StorageError, match=r"--address auto: no Ray cluster answers there \(Could not find"):
        ENGINES["ray"](order(address="auto"))


def test_a_new_ray_does_not_change_what_happens_at_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**options: object) -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray_engine, "_lifelines", lambda ray, address: {})
    before = signal.getsignal(signal.SIGTERM)
    ENGINES["ray"](order())
    assert signal.getsignal(signal.SIGTERM) is before


# ---------------------------------------------------------------------------------------- a Ray that dies


def test_a_ray_that_answers_no_more_is_an_error_and_is_asked_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []
    for name in ("init", "wait", "cancel", "shutdown"):
        monkeypatch.setattr(ray, name, lambda *_, name=name, **__: asked.append(name))
    monkeypatch.setattr(ray_engine, "SILENCE_S", 0.1)
    monkeypatch.setattr(ray_engine, "CONNECT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = server.getsockname()
        monkeypatch.setattr(ray_engine, "_lifelines", lambda ray, address: {"its head": place})
        engine = RayEngine(order(address="head:6379"))
        engine._check()
    message = (
        rf"Ray has died \(its head at 127.0.0.1:{place[1]} does .*: nothing .* the same command goes on with"
    )
    with pytest.raises(StorageError, match=message):
        engine.submit(tmp_path)
    engine.close()
    assert asked == ["init", "shutdown"]


def test_leaving_a_ray_that_hangs_takes_no_longer_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    never, left = threading.Event(), []
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "shutdown", never.wait)
    monkeypatch.setattr(ray_engine, "_lifelines", lambda ray, address: {})
    monkeypatch.setattr(ray_engine, "CLOSE_S", 0.1)
    monkeypatch.setattr(ray_engine.atexit, "unregister", left.append)
    RayEngine(order()).close()
    assert left == [ray.shutdown], "the interpreter would wait for it once more"
    never.set()


def test_a_client_of_ray_hangs_on_its_server_alone() -> None:
    assert ray_engine._lifelines(ray, "ray://[::1]:10001") == {"its server": ("::1", 10001)}


# --------------------------------------------------------------------------------------- a Ray of one node


@pytest.fixture(scope="module", autouse=True)
def awake() -> Iterator[None]:
    """Keep Ray from giving way to all other processes: on a busy machine its workers would hardly start."""
    with pytest.MonkeyPatch.context() as patch, same_sigterm():
        patch.setenv("RAY_worker_niceness", "0")
        yield


@pytest.fixture(scope="module")
def two_places(awake: None) -> Iterator[None]:
    """Start a Ray with room for two tasks, which the engines of these tests join."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.mark.slow
def test_tasks_run_at_once_as_far_as_there_is_room_and_end_as_they_say(
    two_places: None, tmp_path: Path
) -> None:
    engine = RayEngine(order(3), work=stub)
    tasks = [task_in(tmp_path, f"0000{number}") for number in range(3)]
    for task in tasks:
        engine.submit(task)
    first, second, third = tasks
    assert process_of(first) != process_of(second)
    assert not (third / "process").exists()
    assert [engine.ended(task) for task in tasks] == [None, None, None]
    (first / "go").write_text("")
    (second / "go").write_text("ended with exit code 3")
    until(lambda: engine.ended(first) is not None and engine.ended(second) is not None, "two ends")
    assert (engine.ended(first), engine.ended(second)) == ("", "ended with exit code 3")
    process_of(third)
    (third / "go").write_text("")
    until(lambda: engine.ended(third) == "", "the third")
    assert (third / "process").read_text().split()[1:] == ["1", "1"]


@pytest.mark.slow
def test_a_killed_worker_is_told_and_its_task_can_be_submitted_again(
    two_places: None, tmp_path: Path
) -> None:
    engine = RayEngine(order(), work=stub)
    task = task_in(tmp_path, "00000")
    engine.submit(task)
    killed = process_of(task)
    os.kill(killed, signal.SIGKILL)
    until(lambda: engine.ended(task) is not None, "the loss")
    assert str(engine.ended(task)).startswith("was lost: WorkerCrashedError")
    (task / "process").unlink()
    engine.submit(task)
    assert engine.ended(task) is None
    assert process_of(task) != killed
    (task / "go").write_text("")
    until(lambda: engine.ended(task) == "", "the second attempt")


@pytest.mark.slow
def test_closing_lets_workers_leave_and_cancelling_ends_them_at_once(
    two_places: None, tmp_path: Path
) -> None:
    engine = RayEngine(order(2), work=stub)
    gentle, hard = task_in(tmp_path, "00000"), task_in(tmp_path, "00001")
    for task in (gentle, hard):
        engine.submit(task)
        process_of(task)
    engine.cancel(hard)
    until(lambda: engine.ended(hard) is not None, "the end of what was cancelled")
    assert not (hard / "left").exists()
    engine.close()
    assert (gentle / "left").exists()
    assert ray.is_initialized(), "this Ray is not the engine's own"


@pytest.mark.slow
def test_a_real_task_gives_what_it_gives_in_this_process(two_places: None, tmp_path: Path) -> None:
    task = write_task(tmp_path / "run" / "tasks" / "00000", tmp_path / "store", epochs=20)
    engine = RayEngine(order())
    engine.submit(task)
    until(lambda: epochs(task) >= 3 or engine.ended(task) is not None, "three epochs")
    engine.cancel(task)  # kills the process that waits for the worker
    until(lambda: engine.ended(task) is not None, "the loss")
    assert "was lost" in str(engine.ended(task))
    engine.submit(task)
    until(lambda: engine.ended(task) is not None, "the second attempt")
    assert engine.ended(task) == "", (task / "worker.log").read_text()
    assert accuracy_of(task) == by_hand(tmp_path, epochs=20)


# -------------------------------------------------------------------------------------- a node that dies


@pytest.mark.slow
def test_the_tasks_of_a_killed_node_are_lost_and_run_on_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.cluster_utils import Cluster

    ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        doomed = cluster.add_node(num_cpus=1)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        engine = RayEngine(order(), work=stub)
        task = task_in(tmp_path, "00000")
        engine.submit(task)
        before = process_of(task)
        cluster.add_node(num_cpus=1)
        cluster.remove_node(doomed, allow_graceful=False)
        until(lambda: engine.ended(task) is not None, "the loss of the node")
        assert str(engine.ended(task)).startswith("was lost: ")
        (task / "process").unlink()
        engine.submit(task)
        assert process_of(task) != before
        (task / "go").write_text("")
        until(lambda: engine.ended(task) == "", "the task on the other node")
        engine.close()
        assert not ray.is_initialized()
    finally:
        ray.shutdown()
        cluster.shutdown()
