from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from archsearch.architecture import Architecture
from archsearch.errors import IntegrityError, SpecError
from archsearch.recipe import Recipe
from archsearch.search.task import Data, Result, Task, percent, read_progress, write_progress

RECIPE = Recipe(epochs=3, milestones=(0.25, 0.5), lr=0.05)


def task(**changes: Any) -> Task:
    architecture = Architecture.create(
        model="resnet20", input_shape=(1, 8, 8), widths={"a": 3, "b": 8}, sizes={"a": 4, "b": 8}
    )
    data = Data(name="digits", options={"train_share": 0.5}, fingerprint="f" * 64)
    fields: dict[str, Any] = {
        "label": "trial",
        "objective": "short",
        "architecture": architecture,
        "recipe": RECIPE.as_dict(),
        "seed": 7,
        "data": data,
        "device": "cpu",
        "threads": 2,
        "store": "/somewhere",
    }
    return Task(**{**fields, **changes})


def test_a_task_reads_back_as_it_was_written(tmp_path: Path) -> None:
    task().write(tmp_path / "00007")
    again = Task.read(tmp_path / "00007")
    assert again == task()
    assert again.how() == RECIPE
    assert again.widths == {"a": 3, "b": 8}
    assert again.architecture.key == task().architecture.key


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("seed",), "7", "seed"),
        (("threads",), 0, "threads"),
        (("format",), 2, "format 2"),
        (("recipe", "lr"), -1, "lr must be"),
        (("recipe", "learning_rate"), 1, "unknown field 'learning_rate'"),
        (("architecture", "widths", "a", "width"), 5, r"architecture.*more than the size"),
        (("data", "path"), "x", "data.path"),
        (("priority",), 1, "priority"),
        (("store",), None, "store"),
    ],
)
def test_a_task_with_a_wrong_field_is_refused_by_its_name(
    tmp_path: Path, place: tuple[str, ...], value: object, message: str
) -> None:
    task().write(tmp_path)
    content = json.loads((tmp_path / "task.json").read_text())
    part = content
    for name in place[:-1]:
        part = part[name]
    part[place[-1]] = value
    (tmp_path / "task.json").write_text(json.dumps(content))
    with pytest.raises(SpecError, match=message):
        Task.read(tmp_path)


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    task().write(tmp_path)
    content = json.loads((tmp_path / "task.json").read_text())
    del content["device"]
    (tmp_path / "task.json").write_text(json.dumps(content))
    with pytest.raises(SpecError, match=r"task\.json: device"):
        Task.read(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"accuracy": 50.0, "diverged": "at once"},
        {"accuracy": "50"},
        {"accuracy": 50.0, "loss": 1.0},
        [],
    ],
)
def test_a_result_is_one_of_three_ends(tmp_path: Path, content: object) -> None:
    (tmp_path / "result.json").write_text(json.dumps(content))
    with pytest.raises(IntegrityError, match=r"result\.json"):
        Result.read(tmp_path)


def test_there_is_no_result_before_the_end(tmp_path: Path) -> None:
    assert Result.read(tmp_path) is None
    Result(accuracy=50.5, epochs=2, seconds=1.5, training="/t").write(tmp_path)
    assert Result.read(tmp_path) == Result(accuracy=50.5, epochs=2, seconds=1.5, training="/t")


def test_progress_is_by_percent_of_the_schedule(tmp_path: Path) -> None:
    assert read_progress(tmp_path) == {}
    rows = [{"epoch": float(epoch), "validation_accuracy": 10.0 * epoch} for epoch in (1, 2, 3)]
    write_progress(tmp_path, rows, 3)
    assert read_progress(tmp_path) == {33: 10.0, 66: 20.0, 100: 30.0}
    assert [percent(epoch, 4) for epoch in range(1, 5)] == [25, 50, 75, 100]
    rows = [{"epoch": float(epoch), "validation_accuracy": epoch / 4} for epoch in range(1, 301)]
    write_progress(tmp_path, rows, 300)
    # A percent is told by the epoch that fills it, whatever came since; only the last epoch makes 100.
    found = {each: 4 * accuracy for each, accuracy in read_progress(tmp_path).items()}
    assert {each: found[each] for each in (1, 25, 99, 100)} == {1: 3, 25: 75, 99: 297, 100: 300}
    assert list(found) == list(range(101))
    (tmp_path / "progress.jsonl").write_text('{"percent": 33}\n')
    with pytest.raises(IntegrityError, match="progress"):
        read_progress(tmp_path)
