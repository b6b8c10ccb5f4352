from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from find_case import FACTORY
from torch import nn
from training_case import RECIPE, source

from archsearch.errors import DivergedError
from archsearch.models import resolve
from archsearch.rebuild import trace_source
from archsearch.results import Arm
from archsearch.search import finals as finals_module
from archsearch.search.finals import Finalist, Outcome, finals
from archsearch.search.trial import Scratch as OwnScratch
from archsearch.search.work import Finding
from archsearch.trainer import Trainer

UNIFORM, PRUNER, SEARCH = (Finalist(name, {}) for name in ("uniform", "l1_norm", "search"))


class Scratch:
    """Stands for the trainings: each finalist has the accuracies that the test gives."""

    budget = "scratch-e"

    def __init__(self, accuracies: Mapping[str, list[float]]) -> None:
        self._accuracies = accuracies
        self.traced = SimpleNamespace(cost=SimpleNamespace(of=lambda widths: SimpleNamespace()))

    def __call__(self, trainer: object, name: str, widths: object, seed: int) -> Any:
        own = self._accuracies[name.partition(",")[0]]
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
    with pytest.raises(DivergedError, match="a finalist, seed 10001: the loss is nan"):
        finals([Finalist("uniform", widths)], worth, trainer, quest)
