from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from find_case import FACTORY
from scipy import stats
from torch import nn
from training_case import RECIPE, source

from archsearch.errors import DivergedError
from archsearch.models import resolve
from archsearch.rebuild import trace_source
from archsearch.results import Arm
from archsearch.search import finals as finals_module
from archsearch.search.finals import Finalist, Outcome, finals, gain_of_best
from archsearch.search.trial import Scratch as OwnScratch
from archsearch.search.work import Finding
from archsearch.trainer import Trainer

UNIFORM, PRUNER, SEARCH = (Finalist(name, {}) for name in ("uniform", "l1_norm", "search"))


class Scratch:
    """Stands for the trainings: each finalist has the accuracies that the test gives."""

    budget = "scratch-e"

    def __init__(self, accuracies: Mapping[str, list[float]]) -> None:
        self._accuracies = accuracies
        self.traced = SimpleNamespace(
            cost=SimpleNamespace(of=lambda widths: SimpleNamespace(macs=0, params=0))
        )

    def __call__(self, trainer: object, name: str, widths: object, seed: int) -> Any:
        own = self._accuracies[name.partition(",")[0]]
        if own[seed % len(own)] is None:
            raise DivergedError(f"seed {seed}: the loss is nan")
        return SimpleNamespace(accuracy=own[seed % len(own)], model=nn.Identity())


def decided(
    monkeypatch: pytest.MonkeyPatch, accuracies: Mapping[str, list[float]], too_slow: Collection[str] = ()
) -> Outcome:
    def arm(name: str, widths: str, budget: str, _cost: object, results: list[Any]) -> Arm:
        return Arm(name, widths, budget, 0, 0, accuracies=tuple(result.accuracy for result in results))

    monkeypatch.setattr(finals_module, "arm_of", arm)
    worth: Any = SimpleNamespace(scratch=Scratch(accuracies), blind=None, crew=SimpleNamespace(name="inline"))
    quest: Any = SimpleNamespace(finals=3, plan=SimpleNamespace(seed=0))
    trainer: Any = None
    return finals([UNIFORM, PRUNER, SEARCH], worth, trainer, quest, too_slow)


CLEAR = {"uniform": [80.0, 80.1, 80.2], "l1_norm": [85.0, 85.1, 85.2], "search": [82.0, 82.1, 82.2]}
CLOSE = {"uniform": [80.0, 81.0, 82.0], "l1_norm": [80.2, 81.2, 82.2], "search": [80.1, 81.1, 82.1]}


def test_what_is_clearly_better_than_uniform_is_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = decided(monkeypatch, CLEAR)
    assert (outcome.chosen, outcome.exported) == (PRUNER, PRUNER)
    assert "l1_norm gains +5.00" in outcome.verdict
    assert outcome.verdict.endswith("exported")


def test_uniform_is_exported_where_nothing_can_be_told_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = decided(monkeypatch, CLOSE)
    assert (outcome.chosen, outcome.exported) == (PRUNER, UNIFORM)
    assert outcome.verdict.endswith("not distinguishable from uniform, which is exported")


def test_a_finalist_that_is_too_slow_is_compared_and_not_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = decided(monkeypatch, CLEAR, ["l1_norm"])
    assert (outcome.chosen, outcome.exported) == (SEARCH, SEARCH)
    assert [arm.widths for arm in outcome.arms] == ["uniform", "l1_norm", "search"]
    assert sorted(outcome.validation["l1_norm"]) == CLEAR["l1_norm"]


def test_uniform_widths_that_are_too_slow_are_not_exported_either(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = decided(monkeypatch, CLOSE, ["uniform", "l1_norm"])
    assert (outcome.chosen, outcome.exported) == (SEARCH, SEARCH)
    assert outcome.verdict.endswith("not distinguishable from uniform, which is too slow")


def test_where_all_are_too_slow_accuracy_alone_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = decided(monkeypatch, CLEAR, ["uniform", "l1_norm", "search"])
    assert outcome.exported == PRUNER


def test_a_finalist_that_diverges_is_out_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = decided(monkeypatch, {**CLEAR, "l1_norm": [85.0, None, 85.2]})  # type: ignore[dict-item, list-item]
    assert outcome.exported == SEARCH
    assert [(arm.name, len(arm.accuracies)) for arm in outcome.arms] == [
        ("uniform, scratch-e", 3),
        ("l1_norm, scratch-e, diverged", 0),
        ("search, scratch-e", 3),
    ]
    assert list(outcome.validation) == ["uniform", "search"]


def test_nothing_can_be_compared_with_uniform_widths_that_diverge(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DivergedError, match=r"uniform widths, which all are .* nan: give a lower --lr"):
        decided(monkeypatch, {**CLEAR, "uniform": [80.0, 80.1, None]})  # type: ignore[dict-item, list-item]


def test_accuracies_that_do_not_vary_are_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = decided(monkeypatch, {"uniform": [80.0], "l1_norm": [80.2], "search": [80.1]})
    assert (outcome.chosen, outcome.exported) == (PRUNER, UNIFORM)
    assert outcome.verdict == (
        "l1_norm has the highest validation accuracy, with seeds that say nothing of the noise: "
        "not distinguishable from uniform, which is exported"
    )


def test_one_rival_has_the_interval_of_the_t_test() -> None:
    one, control = [91.0, 91.5, 90.7], [90.1, 90.9, 90.0]
    found = gain_of_best({"one": one}, control)
    assert found is not None
    interval = stats.ttest_ind(one, control).confidence_interval(0.95)
    assert found[0] - found[1] == pytest.approx(interval.low, abs=0.01)
    assert found[0] + found[1] == pytest.approx(interval.high, abs=0.01)


def test_the_best_of_three_needs_more_than_a_single_one() -> None:
    rivals = {"a": [80.0, 80.2, 80.4], "b": [81.0, 81.2, 81.4], "c": [80.5, 80.7, 80.9]}
    found = gain_of_best(rivals, [79.8, 80.0, 80.2])
    assert found is not None
    # Deviation 0.2 in all arms; 2.88 in Dunnett's table of 1964 for 3 treatments, 8 degrees, 95 % two-sided.
    assert found == pytest.approx((1.2, 2.88 * 0.2 * (2 / 3) ** 0.5), abs=0.01)


def test_finalists_are_read_from_where_workers_trained_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = trace_source(resolve(FACTORY, trust_code=True), {}, (2, 6, 6))
    recipe = RECIPE.with_(epochs=1)
    trainer = Trainer(source(), "cpu", tmp_path)
    scratch = OwnScratch(traced, recipe, "scratch-e")
    # Somewhere else, by two processes: no address of this one.
    monkeypatch.setattr("archsearch.trainer.processes", lambda: 2)
    widths = dict(traced.graph.sizes)
    trained = {seed: scratch(trainer.blinded(), "worker", widths, seed) for seed in (10_000, 10_001)}
    monkeypatch.undo()
    found = [
        Finding(trained[seed].accuracy, facts={"training": str(trained[seed].directory)}) for seed in trained
    ]
    given: list[Any] = []

    def work(networks: Any, what: str) -> list[Finding]:
        given.extend(networks)
        return found

    worth: Any = SimpleNamespace(
        scratch=scratch,
        traced=traced,
        blind=trainer.blinded(),
        crew=SimpleNamespace(name="ray"),
        trained=work,
    )
    quest: Any = SimpleNamespace(finals=2, plan=SimpleNamespace(seed=0))
    before = len(list(tmp_path.rglob("result.json")))
    outcome = finals([Finalist("uniform", widths)], worth, trainer, quest)
    assert given == [(widths, 10_000), (widths, 10_001)]
    assert outcome.validation["uniform"] == [each.accuracy for each in trained.values()]
    assert len(list(tmp_path.rglob("result.json"))) == before
    assert len(list(tmp_path.rglob("test.json"))) == 2
    for name, tensor in outcome.model.state_dict().items():
        assert torch.equal(tensor, trained[10_000].model.state_dict()[name])
    found[1] = Finding(reason=("diverged", "the loss is nan"))
    with pytest.raises(DivergedError, match=r"uniform widths, .*: seed 10001: the loss is nan: give"):
        finals([Finalist("uniform", widths)], worth, trainer, quest)
