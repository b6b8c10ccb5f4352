from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from find_case import ENVIRONMENT, FACTORY

from archsearch import files
from archsearch.data import load_data
from archsearch.errors import IntegrityError
from archsearch.models import resolve
from archsearch.rebuild import trace_source
from archsearch.recipe import Recipe
from archsearch.search.crew import described
from archsearch.search.task import Data, Result, Task, read_progress
from archsearch.search.trial import Scratch
from archsearch.search.worker import Workshop
from archsearch.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = {"train_share": 0.1}
RECIPE = Recipe(lr=0.05, batch_size=32, epochs=2, schedule="cosine")
WIDTHS = {"conv1": 5, "conv2": 9}
TRACED = trace_source(resolve(FACTORY, trust_code=True), {"in_channels": 1, "num_classes": 10}, (1, 8, 8))


def write_task(directory: Path, **changes: Any) -> Path:
    """Write the task of a tiny network on a tenth of the digits."""
    recipe = changes.pop("recipe", RECIPE)
    fields: dict[str, Any] = {
        "label": "trial",
        "objective": "full",
        "architecture": described(TRACED, changes.pop("widths", WIDTHS)),
        "recipe": recipe.as_dict(),
        "seed": 3,
        "data": Data(name="digits", options=OPTIONS, fingerprint=load_data("digits", **OPTIONS).fingerprint),
        "device": "cpu",
        "threads": 1,
        "store": str(directory.parent / "store"),
        "trust_code": True,
    }
    Task(**{**fields, **changes}).write(directory)
    return directory


def result_of(directory: Path) -> Result:
    result = Result.read(directory)
    assert result is not None
    return result


def trainings(directory: Path) -> list[Path]:
    return sorted((directory / "store" / "trainings").iterdir())


def test_a_worker_trains_what_the_driver_would_train(tmp_path: Path) -> None:
    task = write_task(tmp_path / "task")
    Workshop().do(task)
    result = result_of(task)
    trainer = Trainer(load_data("digits", **OPTIONS), "cpu", tmp_path / "here").blinded()
    expected = Scratch(TRACED, RECIPE, "scratch-e")(trainer, "trial", WIDTHS, 3)
    assert result.accuracy == expected.accuracy
    assert result.epochs == 2
    assert result.training == str(trainings(tmp_path)[0])
    # The same address: whoever trains it next, in whatever process, finds it.
    assert trainings(tmp_path)[0].name == next((tmp_path / "here" / "trainings").iterdir()).name
    assert list(read_progress(task)) == [50, 100]
    assert read_progress(task)[100] == result.accuracy
    assert not list(tmp_path.rglob("test.json"))


def test_a_training_of_the_store_is_read_and_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = write_task(tmp_path / "first"), write_task(tmp_path / "second")
    workshop = Workshop()
    workshop.do(first)
    monkeypatch.setattr("archsearch.training.loop._Loop.train_epoch", None)
    workshop.do(second)
    assert result_of(second) == result_of(first)
    assert read_progress(second) == read_progress(first)


def test_a_task_with_a_result_is_done(tmp_path: Path) -> None:
    Result(accuracy=1.0).write(tmp_path)
    Workshop().do(tmp_path)
    assert result_of(tmp_path) == Result(accuracy=1.0)


def test_what_diverges_is_told(tmp_path: Path) -> None:
    task = write_task(tmp_path / "task", recipe=RECIPE.with_(lr=1e30))
    Workshop().do(task)
    assert result_of(task).accuracy is None
    assert str(result_of(task).diverged).startswith("training diverged: the loss is")


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"trust_code": False}, "UsageError", "add --trust-code"),
        (
            {"data": Data(name="digits", options=OPTIONS, fingerprint="0" * 64)},
            "IntegrityError",
            "other images",
        ),
        ({"data": None}, "IntegrityError", "driver's memory"),
        ({"device": "cuda:99"}, "UsageError", "cuda:99"),
    ],
)
def test_what_goes_wrong_is_told(tmp_path: Path, changes: dict[str, Any], kind: str, message: str) -> None:
    task = write_task(tmp_path / "task", **changes)
    Workshop().do(task)
    assert result_of(task).kind == kind
    assert message in str(result_of(task).error)
    assert "Traceback" in str(result_of(task).traceback)


def test_a_damaged_task_is_an_error_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "task.json").write_text("{")
    Workshop().do(tmp_path)
    assert result_of(tmp_path).kind == "SpecError"
    assert "task.json" in str(result_of(tmp_path).error)


def test_the_file_stop_ends_a_training_that_can_go_on(tmp_path: Path) -> None:
    task = write_task(tmp_path / "task", recipe=RECIPE.with_(epochs=4))
    Workshop(watch=lambda place: (place / "stop").touch()).do(task)
    stopped = result_of(task)
    assert (stopped.stopped, stopped.epochs) == (25, 1)
    assert read_progress(task) == {25: stopped.accuracy}
    (task / "stop").unlink()
    (task / "result.json").unlink()
    Workshop().do(task)
    assert result_of(task).epochs == 4
    assert read_progress(task)[25] == stopped.accuracy
    rows = (trainings(tmp_path)[0] / "metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + 4


def test_after_the_last_epoch_there_is_nothing_to_stop(tmp_path: Path) -> None:
    task = write_task(tmp_path / "task", recipe=RECIPE.with_(epochs=1))
    (task / "stop").touch()
    Workshop().do(task)
    assert result_of(task).stopped is None


def test_a_worker_waits_for_a_training_that_another_process_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = write_task(tmp_path / "first"), write_task(tmp_path / "second")
    Workshop().do(first)
    asked = threading.Event()
    with files.lock(trainings(tmp_path)[0]):
        Workshop().do(second)
        assert result_of(second).kind == "InUseError"
        (second / "result.json").unlink()
        monkeypatch.setattr("archsearch.trainer.time.sleep", lambda seconds: asked.set())
        waiting = threading.Thread(target=Workshop(waits=True).do, args=[second])
        waiting.start()
        assert asked.wait(60)
    waiting.join(60)
    assert result_of(second) == result_of(first)


def test_data_in_memory_stays_with_its_process(tmp_path: Path) -> None:
    data = load_data("digits", **OPTIONS)
    task = write_task(tmp_path / "task", data=None)
    Workshop(TRACED, Trainer(data, "cpu", tmp_path / "store").blinded()).do(task)
    assert result_of(task).epochs == 2


def test_other_data_than_the_drivers_are_refused() -> None:
    with pytest.raises(IntegrityError, match="digits: this worker sees other images"):
        Data(name="digits", options={}, fingerprint="1" * 64).opened()


@pytest.mark.slow
def test_a_worker_process_does_tasks_until_its_driver_is_gone(tmp_path: Path) -> None:
    """The last one is far from its end when the pipe closes: it leaves a checkpoint and no result."""
    short, long = (
        write_task(tmp_path / "short"),
        write_task(tmp_path / "long", recipe=RECIPE.with_(epochs=5000), widths={"conv1": 4, "conv2": 9}),
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "archsearch.search.worker"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    )
    assert process.stdin is not None and process.stderr is not None
    process.stdin.write(f"{short}\n{long}\n".encode())
    process.stdin.flush()
    while not read_progress(long):
        assert process.poll() is None
    process.stdin.close()
    assert process.wait(60) == 75
    assert b"a checkpoint was written" in process.stderr.read()
    process.stderr.close()
    assert result_of(short).epochs == 2
    assert Result.read(long) is None
    assert list((tmp_path / "store").rglob("checkpoints/*"))


@pytest.mark.slow
def test_a_worker_does_the_one_task_that_it_is_given(tmp_path: Path) -> None:
    task = write_task(tmp_path / "task")
    command = [sys.executable, "-m", "archsearch.search.worker", str(task)]
    subprocess.run(command, env=ENVIRONMENT, check=True)
    assert json.loads((task / "result.json").read_text())["epochs"] == 2
