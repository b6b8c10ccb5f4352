from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from archsearch import files
from archsearch.models import resolve
from archsearch.rebuild import load, trace_source
from archsearch.search import presence
from archsearch.search.claims import BEAT, DRIVER, NOTE
from archsearch.search.export import write_finalist
from archsearch.search.facts import FACTS
from archsearch.search.posterior import Gain, Posterior
from archsearch.search.presence import Presence
from archsearch.search.standing import Standing
from archsearch.search.study import ORIGIN, opened

TOLD = {"model": "lenet5", "data": "digits", "targets": ["flops 0.5"], "trials": 4, "groups": []}
ABSENT = "no driver is at work: the same command goes on"


def status(run: Path) -> list[str]:
    return list(Standing.read(run).status())


def begin(run: Path, ended: int, running: int, **told: Any) -> Callable[[], Any]:
    """Return a context in which a driver is at work on a study of so many trials."""
    place = opened(run, {"a": 1})
    study = place.__enter__()
    study.set_user_attr(FACTS, {**TOLD, **told})
    for number in range(ended + running):
        trial = study.ask()
        trial.set_user_attr(ORIGIN, "uniform")
        if number < ended:
            study.tell(trial, 90.0 + number)
    return lambda: place.__exit__(None, None, None)


def test_a_search_that_was_killed_is_not_called_running(tmp_path: Path) -> None:
    leave = begin(tmp_path, ended=2, running=1)
    told = status(tmp_path)
    assert "2 of 4 trials have ended (2 complete, 1 running)" in told
    assert told[-1].endswith(" left, as the last trials took, and the finals")
    leave()
    told = status(tmp_path)
    assert "2 of 4 trials have ended (2 complete, 1 interrupted)" in told
    assert told[-1] == ABSENT
    assert not [line for line in told if "left" in line]


def test_a_search_has_ended_when_its_finals_were_held(tmp_path: Path) -> None:
    begin(tmp_path, ended=4, running=0)()
    assert status(tmp_path)[-1] == ABSENT, "it was killed in its finals"
    files.write_json(tmp_path / "results.json", {})
    assert status(tmp_path)[-1] == f"ended: the results are in {tmp_path}/results.json"


def test_what_best_says_of_dropped_branches_is_what_is_exported(tmp_path: Path) -> None:
    traced = trace_source(resolve("resnet20"), {"in_channels": 1}, (1, 8, 8))
    sizes = traced.graph.sizes
    write_finalist(traced, "uniform", sizes, tmp_path)
    begin(tmp_path, ended=1, running=0, groups=list(sizes.items()), objective="short")()
    gone = {**sizes, "layer1.1.conv1": 0, "layer3.2.conv1": 0}
    Posterior(1, 0.4, gone, {}, Gain(0.8, 0.1, 1.5)).write(tmp_path)
    standing = Standing.read(tmp_path)
    said = standing.best().splitlines()
    written = standing.export(tmp_path / "best.yaml")
    assert written.cost.macs is not None
    parameters = sum(parameter.numel() for parameter in load(tmp_path / "best.yaml").parameters())
    assert f"{written.cost.macs.value:,} MACs, {parameters:,} parameters" in said
    assert "layer3.2.conv1: 0 of 64" in said


class Shared:
    """A shared study as far as its beats go: those who live beat at every look."""

    _study_id = 0

    def __init__(self, *drivers: str) -> None:
        self.living = set(drivers)
        self._beats = dict.fromkeys(drivers, 0)
        self._storage = SimpleNamespace(get_study_system_attrs=self._attributes)

    def _attributes(self, study: int) -> dict[str, int]:
        for driver in self.living:
            self._beats[driver] += 1
        return {BEAT + driver: beat for driver, beat in self._beats.items()}


def running_of(*drivers: str) -> list[FrozenTrial]:
    return [
        optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs={DRIVER: driver}) for driver in drivers
    ]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(presence, "POLL_S", 0.01)
    files.write_json(tmp_path / NOTE, {DRIVER: "own", "study": "shared"})
    return tmp_path


def test_of_a_shared_study_the_beats_say_whose_trials_run(run: Path) -> None:
    study, trials = Shared("own", "other", "dead"), running_of("own", "other", "dead")
    study.living = {"other"}
    found = Presence.of(run, study, trials, watch_s=0.5)  # type: ignore[arg-type]
    assert found
    assert [found.carries_out(trial) for trial in trials] == [False, True, False]
    study.living = set()
    assert not Presence.of(run, study, trials, watch_s=0.1)  # type: ignore[arg-type]


def test_no_beat_is_waited_for_that_says_nothing_new(run: Path) -> None:
    study = Shared("own", "other")
    done = threading.Event()

    def look() -> None:
        with files.lock(run):
            alone = Presence.of(run, Shared("own"), running_of("own"), watch_s=300)  # type: ignore[arg-type]
            both = Presence.of(run, study, running_of("own", "other"), watch_s=300)  # type: ignore[arg-type]
        assert alone.drivers == {"own"}
        assert both.drivers == {"own", "other"}
        done.set()

    threading.Thread(target=look, daemon=True).start()
    assert done.wait(60)
