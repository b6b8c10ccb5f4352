from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from find_case import FACTORY
from training_case import RECIPE, SignalAt, in_child, source

from archsearch import files
from archsearch.architecture import Architecture
from archsearch.data import DataSource
from archsearch.errors import DivergedError, InfeasibleError, IntegrityError, StorageError, UsageError
from archsearch.models import resolve
from archsearch.plan import Plan
from archsearch.rebuild import Traced, load, trace_source
from archsearch.search.driver import Quest, Searched, search
from archsearch.search.study import ORIGIN, SEED, finished, opened
from archsearch.targets import Target
from archsearch.trainer import Trainer
from archsearch.training.callbacks import Callback

pytestmark = pytest.mark.usefixtures("without_pictures")

TRIALS = 7


def network() -> Traced:
    return trace_source(resolve(FACTORY, trust_code=True), {}, (2, 6, 6))


def quest(**changes: Any) -> Quest:
    plan = Plan(
        [Target.parse("flops", changes.pop("flops", "0.5"))],
        recipe=RECIPE.with_(epochs=2),
        budget="scratch-e",
        method=changes.pop("method", "l1_norm"),
    )
    return replace(Quest(plan, trials=TRIALS, short=0.5, finals=2), **changes)


def run(directory: Path, data: DataSource | None = None, **changes: Any) -> tuple[Searched, list[str]]:
    lines: list[str] = []
    callbacks = changes.pop("callbacks", lambda label, place: ())
    trainer = Trainer(data or source(), "cpu", directory / "store", callbacks=callbacks)
    found = search(network(), quest(**changes), trainer, out=directory / "out", say=lines.append)
    return found, lines


def trials(directory: Path) -> list[dict[str, Any]]:
    storage = optuna.storages.RDBStorage(f"sqlite:///{directory / 'out' / 'study.db'}")
    study = optuna.load_study(study_name="search", storage=storage)
    found = [{**trial.user_attrs, "state": trial.state.name, "value": trial.value} for trial in study.trials]
    storage.engine.dispose()
    return found


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Searched, list[str]]:
    directory = tmp_path_factory.mktemp("search")
    return directory, *run(directory)


def test_a_search_starts_from_uniform_and_the_proxy_and_meets_the_target(
    searched: tuple[Path, Searched, list[str]],
) -> None:
    directory, found, _ = searched
    done = trials(directory)
    first = ["uniform", "uniform, again", "uniform, again", "l1_norm:knapsack"]
    assert [trial[ORIGIN] for trial in done[:4]] == first
    assert [trial[SEED] for trial in done[:4]] == [0, 1, 2, 0]
    assert len(done) == TRIALS and {trial["state"] for trial in done} == {"COMPLETE"}
    limit = network().cost.reference.macs // 2
    assert all(trial["macs"] <= limit for trial in done)
    assert found.architecture.cost.macs.value <= limit


def test_the_finals_hold_uniform_the_proxy_and_the_recommendation(
    searched: tuple[Path, Searched, list[str]],
) -> None:
    directory, found, lines = searched
    assert [arm.widths for arm in found.record.arms] == ["reference", "uniform", "l1_norm:knapsack", "search"]
    assert all(len(arm.accuracies) == 2 for arm in found.record.arms[1:])
    assert found.outcome.verdict in lines
    if found.outcome.exported.name == "uniform":
        assert "exported" in found.outcome.verdict
    written = Architecture.read(directory / "out" / "architecture.yaml")
    assert {name: group.width for name, group in written.widths.items()} == dict(
        found.outcome.exported.widths
    )
    model = load(directory / "out" / "architecture.yaml", trust_code=True)
    assert sum(parameter.numel() for parameter in model.parameters()) == written.cost.params.value


def test_trials_leave_the_test_set_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, searched: tuple[Path, Searched, list[str]]
) -> None:
    directory, _, _ = searched
    measured = [path.parent for path in (directory / "store").rglob("test.json")]
    trained = [path.parent for path in (directory / "store").rglob("result.json")]
    # Three finalists and the reference with their seeds; some may be one network.
    assert len(measured) <= 7 < len(trained) + 1
    blind = Trainer(source(), "cpu", tmp_path).blinded()
    monkeypatch.setattr("archsearch.trainer.evaluate", None)  # what measures on the test set
    torch.manual_seed(0)
    result = blind.train("trial", network().model, RECIPE.with_(epochs=1), 0)
    assert 0 <= result.accuracy <= 100
    assert not list(tmp_path.rglob("test.json"))


def test_the_same_search_again_trains_nothing(searched: tuple[Path, Searched, list[str]]) -> None:
    directory, found, _ = searched
    started = []

    def watch(label: str, place: Path) -> Sequence[Callback]:
        class Started(Callback):
            def on_step(self, state: Any) -> None:
                started.append(label)

        return [Started()]

    again, _ = run(directory, callbacks=watch)
    assert not started
    assert again.record.arms == found.record.arms
    assert len(trials(directory)) == TRIALS


def test_more_trials_go_on_with_the_study(tmp_path: Path) -> None:
    run(tmp_path, trials=4)
    run(tmp_path, trials=6)
    assert [trial["state"] for trial in trials(tmp_path)] == ["COMPLETE"] * 6


@pytest.mark.slow
def test_a_killed_search_ends_as_one_in_peace(tmp_path: Path) -> None:
    count = iter(range(100))

    def killer(label: str, place: Path) -> Sequence[Callback]:
        return [SignalAt(3, signal.SIGKILL)] if label == "trial" and next(count) == 3 else []

    def body() -> None:
        torch.set_num_threads(1)
        run(tmp_path / "killed", callbacks=killer)

    assert in_child(body) == -signal.SIGKILL
    states = [trial["state"] for trial in trials(tmp_path / "killed")]
    assert states == ["COMPLETE"] * 3 + ["RUNNING", "WAITING"][: len(states) - 3]
    run(tmp_path / "killed")
    run(tmp_path / "peaceful")
    ended = [trials(tmp_path / name) for name in ("killed", "peaceful")]
    for trial in [*ended[0], *ended[1]]:
        del trial["seconds"], trial["training"]  # a clock and a place
    assert ended[0] == ended[1]


def test_another_search_in_the_same_place_is_refused(searched: tuple[Path, Searched, list[str]]) -> None:
    directory, _, _ = searched
    with pytest.raises(IntegrityError, match=r"another search: targets was \['flops 0.5'\]"):
        run(directory, flops="0.6")


def test_one_driver_at_a_time(tmp_path: Path) -> None:
    with opened(tmp_path, {"a": 1}) as study:
        assert finished(study) == 0
        with pytest.raises(StorageError, match="in use"), opened(tmp_path, {"a": 1}):
            pass
    with files.lock(tmp_path):
        pass


def test_the_proxy_objective_trains_only_reference_and_finalists(tmp_path: Path) -> None:
    labels = []

    def watch(label: str, place: Path) -> Sequence[Callback]:
        labels.append(label)
        return ()

    found, _ = run(tmp_path, objective="proxy", sampler="random", callbacks=watch)
    assert "trial" not in labels
    assert [arm.widths for arm in found.record.arms][-1] == "best trial"
    assert found.outcome.validation.keys() == {"uniform", "l1_norm:knapsack", "search", "best trial"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trials": 0}, "--trials 0"),
        ({"finals": 1}, "--finals 1"),
        ({"objective": "best"}, "objective.*best"),
        ({"sampler": "tep"}, "tep"),
        ({"method": "slimming"}, "--proxy slimming"),
        ({"short": 0.0, "objective": "short"}, "--short 0"),
    ],
)
def test_wrong_words_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(tmp_path, **changes)
    assert not (tmp_path / "store").exists()


def test_a_reference_that_diverges_is_named_and_a_lower_rate_may_be_given_in_the_same_place(
    tmp_path: Path,
) -> None:
    plan = replace(quest().plan, recipe=RECIPE.with_(epochs=2, lr=1e30))
    with pytest.raises(DivergedError, match=r"^reference: training diverged: .* smaller --lr"):
        run(tmp_path, plan=plan)
    run(tmp_path, trials=1, objective="proxy")


def test_an_impossible_target_shows_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(InfeasibleError):
        run(tmp_path, flops="0.001")
    assert not (tmp_path / "store").exists()
