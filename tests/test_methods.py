from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from find_case import FACTORY, RECIPE, CountSteps
from scipy import stats
from training_case import source

from archsearch.errors import UnknownNameError, UsageError
from archsearch.methods import compare
from archsearch.results import Arm, Record, gain


def run(directory: Path, methods: str, **options: Any) -> tuple[Record, list[Path]]:
    defaults: dict[str, Any] = {
        "flops": 0.5,
        "trust_code": True,
        "data": source(),
        "recipe": RECIPE,
        "device": "cpu",
        "budget": "scratch-e",
        "store": directory / "store",
    }
    return compare(FACTORY, methods, out=directory / "out", **{**defaults, **options})


def test_reference_and_uniform_widths_stand_once_beside_every_method(tmp_path: Path) -> None:
    record, paths = run(tmp_path, "uniform,l1_norm,taylor:local", seeds=2)
    names = [arm.name for arm in record.arms]
    assert names == [
        "reference",
        "uniform, finetune",
        "uniform, scratch-e",
        "l1_norm, finetune",
        "l1_norm, scratch-e",
        "taylor:local, finetune",
        "taylor:local, scratch-e",
    ]
    assert [path.relative_to(tmp_path / "out").as_posix() for path in paths] == [
        "uniform/architecture.yaml",
        "l1_norm/architecture.yaml",
        "taylor-local/architecture.yaml",
        "results.json",
        "results.md",
    ]
    assert all(path.is_file() for path in paths)
    assert record.conditions["methods"] == ["uniform", "l1_norm", "taylor:local"]
    assert "method" not in record.conditions


def test_equal_widths_of_two_methods_are_trained_once(tmp_path: Path) -> None:
    steps = CountSteps()
    counted: dict[str, Any] = {"callbacks": lambda label, directory: [steps], "store": tmp_path / "store"}
    run(tmp_path / "a", "uniform", **counted)
    before = steps.steps
    record, _ = run(tmp_path / "b", "fpgm", **counted)  # local allocation: the widths are the uniform ones
    arms = {arm.name: arm for arm in record.arms}
    assert arms["fpgm, scratch-e"].accuracies == arms["uniform, scratch-e"].accuracies
    assert steps.steps - before == arms["fpgm, finetune"].epochs * before // (
        arms["reference"].epochs + arms["uniform, scratch-e"].epochs + arms["fpgm, finetune"].epochs
    )


@pytest.mark.parametrize(
    ("methods", "error"),
    [("l1_norm,l1norm", UnknownNameError), ("l1_norm:best", UnknownNameError), (",", UsageError)],
)
def test_a_wrong_method_is_refused_before_anything_is_trained(
    tmp_path: Path, methods: str, error: type[Exception]
) -> None:
    with pytest.raises(error):
        run(tmp_path, methods)
    assert not (tmp_path / "store").exists()


def arm(widths: str, *accuracies: float) -> Arm:
    return Arm(f"{widths}, scratch-e", widths, "scratch-e", 1, 1, accuracies=accuracies)


def test_gains_and_their_intervals_are_scipys() -> None:
    one, other = arm("l1_norm", 91.0, 91.5, 90.7), arm("uniform", 90.1, 90.9, 90.0, 90.4)
    found = gain(one, other)
    assert found is not None
    interval = stats.ttest_ind(one.accuracies, other.accuracies, equal_var=False).confidence_interval(0.95)
    assert (found[0] - found[1], found[0] + found[1]) == pytest.approx((interval.low, interval.high))


def test_one_seed_or_no_uniform_arm_says_nothing_about_gains() -> None:
    assert gain(arm("l1_norm", 91.0), arm("uniform", 90.0, 91.0)) is None
    assert gain(arm("l1_norm", 91.0, 92.0), None) is None
    assert gain(arm("a", 91.0, 91.0), arm("uniform", 90.0, 90.0)) is None
    header, *rows = Record(
        {}, [arm("reference", 93.0), arm("uniform", 90.0, 91.0), arm("b", 92.0, 91.0)]
    ).table()
    assert header[-1] == "over uniform (95 %)"
    assert [cells[-1] for cells in rows[:2]] == ["-", "-"]
    assert rows[2][-1].startswith("+1.00 ± ")
    assert len(Record({}, [arm("reference", 93.0), arm("uniform", 90.0)]).table()[0]) == len(header) - 1
