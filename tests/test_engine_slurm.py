from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from engine_case import accuracy_of, by_hand, epochs, until, write_task

from archsearch.errors import StorageError, UsageError
from archsearch.search.engines import ENGINES, Engine, Order
from archsearch.search.engines.slurm import SlurmEngine

submitit = pytest.importorskip("submitit", reason="the extra 'slurm' is not installed")

FAKES = {
    # Keeps what it was given, as a cluster would.
    "sbatch": "env > {log}/environment; cat $1 > {log}/batch; echo Submitted batch job 4711",
    "srun": "exit 1",
    "scancel": "echo $* >> {log}/cancelled",
    "sacct": "printf 'JobID|State|NodeList\\n4711|%s|n1\\n' $(cat {log}/state)",
}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands of a SLURM that runs nothing; returns where they leave what they were told."""
    log, programs = tmp_path / "log", tmp_path / "bin"
    log.mkdir()
    programs.mkdir()
    (log / "state").write_text("PENDING")
    for name, script in FAKES.items():
        program = programs / name
        program.write_text(f"#!/bin/sh\n{script.format(log=log)}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    submitit.SlurmJob.watcher.clear()
    return log


def engine(jobs: int = 1, **options: object) -> SlurmEngine:
    made = ENGINES["slurm"](Order(jobs=jobs, device=str(options.pop("device", "cpu")), options=options))
    assert isinstance(made, SlurmEngine)
    return made


def task_in(directory: Path, name: str = "00003") -> Path:
    task = directory / "tasks" / name
    task.mkdir(parents=True)
    return task


# ------------------------------------------------------------------------------------ what SLURM is asked


def test_a_task_is_a_job_with_what_it_needs_and_what_the_user_says(cluster: Path, tmp_path: Path) -> None:
    made = engine(
        4,
        device="cuda",
        gpus=2,
        cpus=8,
        slurm={"partition": "long", "timeout_min": "90", "account": "vision"},
    )
    task = task_in(tmp_path)
    made.submit(task)
    batch = (cluster / "batch").read_text()
    for flag in [
        "--partition=long",
        "--time=90",
        "--account=vision",
        "--gpus-per-node=2",
        "--cpus-per-task=8",
        "--signal=USR2@90",
        "--job-name=archsearch",
    ]:
        assert f"#SBATCH {flag}\n" in batch
    assert (made.slots, made.threads) == (4, 8)
    assert json.loads((task / "job.json").read_text()) == {"cluster": "slurm", "job": "4711"}
    assert made.ended(task) is None


def test_no_job_gets_the_secrets_of_the_storage(
    cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARCHSEARCH_STORAGE", "postgresql://a:hunter2@h/d")
    monkeypatch.setenv("PGPASSWORD", "hunter2")
    engine().submit(task_in(tmp_path))
    assert "PATH=" in (cluster / "environment").read_text()
    left = [path for path in tmp_path.rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]
    assert not left
    assert os.environ["PGPASSWORD"] == "hunter2"


@pytest.fixture
def queued(cluster: Path, tmp_path: Path) -> Path:
    """A task whose job is in the queue, submitted by a driver that is gone."""
    task = task_in(tmp_path)
    engine().submit(task)
    (cluster / "batch").unlink()
    return task


def test_a_driver_that_starts_again_finds_its_job_in_the_queue(cluster: Path, queued: Path) -> None:
    again = engine()
    again.submit(queued)
    assert not (cluster / "batch").exists()
    assert again.ended(queued) is None
    again.cancel(queued)
    assert (cluster / "cancelled").read_text() == "4711\n"


def test_a_job_that_is_cancelled_is_not_taken_for_that_of_the_next_task(cluster: Path, queued: Path) -> None:
    again = engine()
    again.cancel(queued)  # another training is to be in this directory
    assert (cluster / "cancelled").read_text() == "4711\n"
    again.submit(queued)
    assert (cluster / "batch").exists()


def test_a_job_that_slurm_killed_is_lost_and_submitted_anew(cluster: Path, tmp_path: Path) -> None:
    task = task_in(tmp_path)
    made = engine()
    made.submit(task)
    (cluster / "state").write_text("NODE_FAIL")
    submitit.SlurmJob.watcher.update()
    lost = made.ended(task)
    assert lost is not None
    assert "was lost (job 4711 is NODE_FAIL; see " in lost
    (cluster / "batch").unlink()
    made.submit(task)
    assert (cluster / "batch").exists()


def test_closing_cancels_the_jobs_that_are_left(cluster: Path, tmp_path: Path) -> None:
    made = engine(2)
    made.submit(task_in(tmp_path))
    made.close()
    assert (cluster / "cancelled").read_text() == "4711\n"


# -------------------------------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slurm": {"cluster": "moon"}}, "--slurm cluster=moon: give slurm or local"),
        ({"slurm": {"cluster": "local", "timeout_min": "soon"}}, "--slurm: .*timeout_min"),
        ({"slurm": {"partitoin": "gpu", "cluster": "local"}}, "--slurm: .*'partitoin' for executor 'slurm'"),
        ({"gpus": 1, "device": "cpu", "slurm": {"cluster": "local"}}, "--gpus-per-task 1: with --device cpu"),
        ({"device": "cuda", "slurm": {"cluster": "local"}}, "--device cuda: .*--gpus-per-task 1"),
        ({"cpus": -1, "slurm": {"cluster": "local"}}, "--cpus-per-task -1: at least 1"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_at_once(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        engine(**options)


def test_without_slurm_the_way_to_try_it_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UsageError, match=r"--engine slurm: .*sbatch and srun are.*--slurm cluster=local"):
        engine()


def test_without_submitit_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UsageError, match=r"archsearch\[slurm\]"):
        engine()


def test_a_job_file_that_names_no_job_is_refused(tmp_path: Path) -> None:
    task = task_in(tmp_path)
    (task / "job.json").write_text('{"cluster": "local", "job": "../../x"}')
    with pytest.raises(StorageError, match=r"job\.json: names no job"):
        engine(slurm={"cluster": "local"}).submit(task)


# -------------------------------------------------------------------------------------------- real workers


def local() -> Engine:
    return engine(slurm={"cluster": "local", "timeout_min": 10})


def job_of(task: Path) -> int:
    return int(json.loads((task / "job.json").read_text())["job"])


def children(process: int) -> list[int]:
    return [
        int(word)
        for thread in Path(f"/proc/{process}/task").iterdir()
        for word in (thread / "children").read_text().split()
    ]


def finish(made: Engine, task: Path) -> str | None:
    until(lambda: made.ended(task) is not None, "the job")
    return made.ended(task)


@pytest.fixture
def begun(tmp_path: Path) -> tuple[Engine, Path]:
    """A driver, and its task of 20 epochs in the middle of its training."""
    task = write_task(tmp_path / "run" / "tasks" / "00000", tmp_path / "store", epochs=20)
    first = local()
    first.submit(task)
    until(lambda: epochs(task) >= 3 or first.ended(task) is not None, "three epochs")
    return first, task


@pytest.mark.slow
def test_a_killed_job_is_lost_and_the_next_one_goes_on_from_its_checkpoint(
    begun: tuple[Engine, Path], tmp_path: Path
) -> None:
    first, task = begun
    controller = job_of(task)
    attempt = children(controller)[0]
    worker = children(attempt)[0]
    for process in (controller, attempt):
        os.kill(process, signal.SIGKILL)
    assert "was lost" in str(finish(first, task))
    until(lambda: not Path(f"/proc/{worker}").exists(), "the end of the worker of a killed job")
    before = epochs(task)
    assert 3 <= before < 20
    first.close()
    second = local()  # a driver that starts again, too
    second.submit(task)
    assert job_of(task) != controller
    assert finish(second, task) == ""
    assert accuracy_of(task) == by_hand(tmp_path, epochs=20)
    second.close()


@pytest.mark.slow
def test_a_preempted_job_is_queued_again_and_its_driver_may_be_another_one(
    begun: tuple[Engine, Path], tmp_path: Path
) -> None:
    first, task = begun
    job = job_of(task)
    attempt = children(job)[0]
    os.kill(attempt, signal.SIGUSR2)  # what SLURM sends before the time is over
    second = local()
    second.submit(task)
    assert job_of(task) == job, "the job is found again"
    assert finish(second, task) == ""
    first.close()
    second.close()
    assert accuracy_of(task) == by_hand(tmp_path, epochs=20)
    log = (task / "slurm" / f"{job}_0_log.err").read_text() + (
        task / "slurm" / f"{job}_0_log.out"
    ).read_text()
    assert "Requeued job" in log
