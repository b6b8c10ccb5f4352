from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest

from archsearch.errors import ArchsearchError, PreemptedError, ResourceError, UsageError
from archsearch.models import resolve
from archsearch.pruning import uniform_widths
from archsearch.rebuild import trace_source
from archsearch.recipe import Recipe
from archsearch.search import loop
from archsearch.search.board import Board
from archsearch.search.crew import described
from archsearch.search.loop import run
from archsearch.search.rungs import Rungs
from archsearch.search.sampler import WIDTHS, ModelSampler
from archsearch.search.study import ORIGIN, SEED, Start, Surface, enqueue, finished
from archsearch.search.task import Result, Task, write_progress
from archsearch.search.work import LOSSES, Direct, Tasks
from archsearch.space import SearchSpace
from archsearch.targets import Target

TRACED = trace_source(resolve("resnet20"), {"in_channels": 1}, (1, 8, 8))
ALLOWED = SearchSpace().allowed(TRACED.graph)
TARGETS = [Target.parse("flops", "0.5")]
SURFACE = Surface(TRACED.cost, ALLOWED, TARGETS)
UNIFORM = uniform_widths(TRACED.cost, ALLOWED, TARGETS)
STARTS = [Start("uniform", UNIFORM, 0), Start("uniform, again", UNIFORM, 1)]
STUDIES: dict[Path, optuna.Study] = {}
"""In memory, by run directory: what a database keeps is the storage's to test."""


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "POLL_S", 0.0)


def worth(widths: Mapping[str, int], seed: int) -> float:
    return sum(width * (index + 1) for index, width in enumerate(widths.values())) / 100 + seed / 1000


def task_of(widths: Mapping[str, int], seed: int) -> Task:
    return Task(
        label="trial",
        objective="full",
        architecture=described(TRACED, widths),
        recipe=Recipe(epochs=4).as_dict(),
        seed=seed,
        data=None,
        device="cpu",
        threads=1,
        store="/nowhere",
    )


class Fake:
    """An engine without workers: a task ends after some looks at it, as a script says.

    Args:
        slots: As an engine's.
        script: Returns the result of a task's submission, an exception's name to lose its worker, or ``None``
            for a task that never ends; by default what its widths are worth.
    """

    threads = 1

    def __init__(
        self, slots: int = 1, script: Callable[[Path, int], Result | str | None] | None = None
    ) -> None:
        self.slots, self._script = slots, script or (lambda task, count: valued(task))
        self.submitted: list[int] = []
        self.cancelled: list[int] = []
        self.most = 0
        self._looks: dict[Path, int] = {}
        self.closed = False

    def submit(self, task: Path) -> None:
        self.submitted.append(int(task.name))
        # Later ones end earlier.
        self._looks[task] = 3 * (7 - int(task.name) % 7)
        self.most = max(self.most, len(self._looks))
        assert len(self._looks) <= self.slots

    def ended(self, task: Path) -> str | None:
        if task not in self._looks:
            return ""
        self._looks[task] -= 1
        if self._looks[task]:
            return None
        result = self._script(task, self.submitted.count(int(task.name)))
        if result is None:
            self._looks[task] = 10**9
            return None
        del self._looks[task]
        if isinstance(result, str):
            return result
        result.write(task)
        return ""

    def cancel(self, task: Path) -> None:
        self.cancelled.append(int(task.name))
        self._looks.pop(task, None)

    def close(self) -> None:
        self.closed = True


def valued(task: Path, epochs: int = 4) -> Result:
    described = Task.read(task)
    return Result(accuracy=worth(described.widths, described.seed), epochs=epochs, seconds=2.0, training="/t")


def search(
    directory: Path,
    engine: Fake,
    trials: int = 8,
    say: Callable[[str], None] = lambda line: None,
    **more: Any,
) -> list[optuna.trial.FrozenTrial]:
    """Search with the model's points; return all trials."""
    sampler = more.pop("sampler", None) or ModelSampler(SURFACE.names, 0)
    study = STUDIES.setdefault(directory, optuna.create_study(direction="maximize"))
    work = Tasks(directory / "tasks", engine, task_of, say)
    run(study, SURFACE, sampler, work, trials, more.pop("starts", STARTS), 0, say, **more)
    return study.get_trials()


def outcome(trials: Sequence[optuna.trial.FrozenTrial]) -> list[tuple[int, str, int, float | None, str]]:
    return [(t.number, t.user_attrs[WIDTHS], t.user_attrs[SEED], t.value, t.state.name) for t in trials]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[optuna.trial.FrozenTrial]:
    before, loop.POLL_S = loop.POLL_S, 0.0
    try:
        return search(tmp_path_factory.mktemp("alone"), Fake())
    finally:
        loop.POLL_S = before


def test_slots_change_when_trials_end_and_nothing_else(
    tmp_path: Path, alone: list[optuna.trial.FrozenTrial]
) -> None:
    engine = Fake(3)
    together = search(tmp_path, engine)
    assert engine.most == 3
    ends = [t.number for t in sorted(together, key=lambda t: t.datetime_complete)]  # type: ignore[arg-type,return-value]
    assert ends != sorted(ends)
    assert outcome(together) == outcome(alone)
    assert [t.number for t in alone] == list(range(8))
    assert {t.state.name for t in together} == {"COMPLETE"}


def test_a_trial_says_how_it_was_trained(alone: list[optuna.trial.FrozenTrial]) -> None:
    facts = alone[0].user_attrs
    assert {name: facts[name] for name in (ORIGIN, SEED, "epochs", "seconds", "training")} == {
        ORIGIN: "uniform",
        SEED: 0,
        "epochs": 4,
        "seconds": 2.0,
        "training": "/t",
    }
    assert facts["macs"] == TRACED.cost.of(UNIFORM).macs
    assert json.loads(facts[WIDTHS]) == [UNIFORM[name] for name in TRACED.cost.names]


def test_the_same_widths_and_seed_are_told_and_not_trained(tmp_path: Path) -> None:
    starts = [*STARTS, Start("l1_norm", UNIFORM, 0), Start("taylor", UNIFORM, 1)]
    engine, lines = Fake(4), []
    trials = search(tmp_path, engine, 4, lines.append, starts=starts)
    assert engine.submitted == [0, 1]
    assert [t.value for t in trials] == [worth(UNIFORM, seed) for seed in (0, 1, 0, 1)]
    assert [t.user_attrs.get("same_as") for t in trials] == [None, None, 0, 1]
    assert sum(t.user_attrs["seconds"] for t in trials) == 4.0
    assert any("as trial 0" in line for line in lines)


def test_a_lost_worker_is_replaced_and_the_search_goes_on(
    tmp_path: Path, alone: list[optuna.trial.FrozenTrial]
) -> None:
    lines: list[str] = []
    engine = Fake(2, lambda task, count: "was killed by signal 9" if count < 3 else valued(task))
    trials = search(tmp_path, engine, say=lines.append)
    assert outcome(trials) == outcome(alone)
    assert len(engine.submitted) == 3 * 8
    assert "trial 0: its worker was killed by signal 9: started again from its checkpoint" in lines


def test_a_task_that_loses_worker_after_worker_is_given_up(tmp_path: Path) -> None:
    engine = Fake(2, lambda task, count: "was killed" if task.name == "00002" else valued(task))
    trials = search(tmp_path, engine)
    assert engine.submitted.count(2) == 1 + LOSSES
    assert [t.number for t in trials if t.state.name == "FAIL"] == [2]
    assert trials[2].user_attrs["lost"] == f"its worker was killed, {1 + LOSSES} times in a row"
    assert len(trials) == 8


def test_losses_count_only_where_no_epoch_lies_between(tmp_path: Path) -> None:
    def script(task: Path, count: int) -> Result | str:
        rows = [{"epoch": float(e), "validation_accuracy": 1.0} for e in range(1, count + 1)]
        write_progress(task, rows, 100)
        return "was preempted" if count < 8 else valued(task)

    trials = search(tmp_path, Fake(1, script), 1)
    assert trials[0].value == worth(UNIFORM, 0)


def test_a_network_that_fails_is_given_up_with_its_reason(tmp_path: Path) -> None:
    def script(task: Path, count: int) -> Result:
        if task.name == "00003":
            return Result(diverged="the loss is nan")
        return Result(error="no kernel", kind="RuntimeError") if task.name == "00004" else valued(task)

    trials = search(tmp_path, Fake(1, script))
    assert {t.number: t.user_attrs.get("diverged", t.user_attrs.get("error")) for t in trials[3:5]} == {
        3: "the loss is nan",
        4: "no kernel",
    }
    assert [t.state.name for t in trials].count("FAIL") == 2
    assert len(trials) == 8


def test_one_failure_after_another_ends_the_search(tmp_path: Path) -> None:
    engine = Fake(1, lambda task, count: Result(error="no kernel", kind="RuntimeError"))
    with pytest.raises(ArchsearchError, match=r"3 trials in a row had no result; .* no kernel"):
        search(tmp_path, engine)


def test_an_error_that_all_trials_share_ends_the_search_which_goes_on_when_it_is_mended(
    tmp_path: Path, alone: list[optuna.trial.FrozenTrial]
) -> None:
    full = Fake(2, lambda task, count: Result(error="disk full", kind="ResourceError"))
    with pytest.raises(ResourceError, match="disk full"):
        search(tmp_path, full)
    assert outcome(search(tmp_path, Fake(2))) == outcome(alone)


def test_an_error_that_is_made_from_more_than_a_message_is_told_too(tmp_path: Path) -> None:
    unknown = Fake(1, lambda task, count: Result(error="unknown data 'birds'", kind="UnknownNameError"))
    with pytest.raises(UsageError, match="unknown data 'birds'"):
        search(tmp_path, unknown)


def kill(directory: Path, told: int) -> None:
    """Leave a study as a driver does that is killed with two trials in flight."""

    class Killed(BaseException):
        pass

    def script(task: Path, count: int) -> Result:
        if int(task.name) >= told:
            raise Killed
        return valued(task)

    with pytest.raises(Killed):
        search(directory, Fake(2, script))


def test_what_a_killed_driver_was_at_is_picked_up(
    tmp_path: Path, alone: list[optuna.trial.FrozenTrial]
) -> None:
    kill(tmp_path, 4)
    study = STUDIES[tmp_path]
    running = [t.number for t in study.get_trials() if t.state.name == "RUNNING"]
    assert len(running) == 2
    assert finished(study) == len(study.trials) - 2
    # One of the two had its result written after the driver's death.
    valued(tmp_path / "tasks" / f"{running[0]:05d}").write(tmp_path / "tasks" / f"{running[0]:05d}")
    engine = Fake(2)
    trials = search(tmp_path, engine)
    assert outcome(trials) == outcome(alone)
    assert running[0] not in engine.submitted
    assert not engine.cancelled
    assert running[1] in engine.submitted
    assert len(engine.submitted) == len(set(engine.submitted))


@pytest.mark.parametrize("number", [0, 3])
def test_a_trial_whose_driver_died_before_it_had_widths_is_the_same_one(
    tmp_path: Path, number: int, alone: list[optuna.trial.FrozenTrial]
) -> None:
    search(tmp_path, Fake(), number)
    study = STUDIES[tmp_path]
    if not number:
        enqueue(study, SURFACE, STARTS)
    assert study.ask().number == number
    assert outcome(search(tmp_path, Fake(2))) == outcome(alone)


def test_what_another_driver_has_told_meanwhile_stays(
    tmp_path: Path, alone: list[optuna.trial.FrozenTrial]
) -> None:
    def script(task: Path, count: int) -> Result | str:
        if int(task.name) < 3:  # this driver had been paused for so long that it counted as dead
            STUDIES[tmp_path].tell(int(task.name), -1.0)
        write_progress(task, [{"epoch": 1.0, "validation_accuracy": 1.0}], 4)
        if task.name == "00001":
            return Result(diverged="the loss is nan")
        return valued(task)

    lines: list[str] = []
    trials = search(tmp_path, Fake(2, script), 8, lines.append)
    assert [t.value for t in trials[:3]] == [-1.0] * 3
    assert outcome(trials)[3:] == outcome(alone)[3:]
    assert "seconds" not in trials[0].user_attrs
    assert sum("trial 8 of 8" in line for line in lines) == 1


def test_the_tasks_of_a_study_that_is_gone_are_not_taken_for_this_ones(tmp_path: Path) -> None:
    search(tmp_path, Fake())
    del STUDIES[tmp_path]
    for path in (tmp_path / "tasks").glob("*/task.json"):
        content = json.loads(path.read_text())
        content["recipe"]["epochs"] = 5
        path.write_text(json.dumps(content))
    engine = Fake()
    search(tmp_path, engine)
    assert sorted(engine.submitted) == list(range(8))
    # A cluster's job may have survived the study.
    assert sorted(engine.cancelled) == list(range(8))


def test_more_trials_extend_a_study(tmp_path: Path, alone: list[optuna.trial.FrozenTrial]) -> None:
    search(tmp_path, Fake(), 3)
    engine = Fake(2)
    assert outcome(search(tmp_path, engine)) == outcome(alone)
    assert not set(engine.submitted) & {0, 1, 2}


@pytest.mark.parametrize(("signum", "error"), [("SIGTERM", PreemptedError), ("SIGINT", KeyboardInterrupt)])
def test_a_signal_ends_the_search_which_goes_on(
    tmp_path: Path, signum: str, error: type[BaseException], alone: list[optuna.trial.FrozenTrial]
) -> None:
    def script(task: Path, count: int) -> Result | None:
        if task.name == "00003":
            os.kill(os.getpid(), signal.Signals[signum])
            return None
        return valued(task)

    with pytest.raises(error):
        search(tmp_path, Fake(1, script))
    assert outcome(search(tmp_path, Fake(2))) == outcome(alone)


def test_a_signal_is_seen_between_values_that_come_at_once() -> None:
    study = optuna.create_study(direction="maximize")

    def interrupted(widths: Mapping[str, int], seed: int) -> float:
        if finished(study) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return worth(widths, seed)

    sampler = ModelSampler(SURFACE.names, 0)
    with pytest.raises(KeyboardInterrupt):
        run(study, SURFACE, sampler, Direct(interrupted), 8, STARTS, 0, lambda line: None)
    assert finished(study) == 4


def test_every_trial_is_observed_before_its_end_is_told() -> None:
    states: list[tuple[int, str]] = []
    study = optuna.create_study(direction="maximize")
    run(
        study,
        SURFACE,
        ModelSampler(SURFACE.names, 0),
        Direct(worth),
        3,
        STARTS,
        0,
        lambda line: None,
        observe=lambda number: states.append((number, study.trials[number].state.name)),
    )
    assert states == [(0, "RUNNING"), (1, "RUNNING"), (2, "RUNNING")]


class Curves(Fake):
    """Trials with four epochs each, whose accuracy rises to what the widths are worth."""

    def ended(self, task: Path) -> str | None:
        if task not in self._looks:
            return ""
        epochs = len((task / "progress.jsonl").read_text().splitlines()) if self.begun(task) else 0
        stopped = (task / "stop").exists() and epochs < 4
        if stopped or epochs == 4:
            del self._looks[task]
            result = valued(task, epochs)
            if stopped:
                assert result.accuracy is not None
                result = Result(accuracy=result.accuracy * epochs / 4, epochs=epochs, stopped=25 * epochs)
            result.write(task)
            return ""
        value = valued(task).accuracy
        assert value is not None
        rows = [{"epoch": float(e), "validation_accuracy": value * e / 4} for e in range(1, epochs + 2)]
        write_progress(task, rows, 4)
        return None

    @staticmethod
    def begun(task: Path) -> bool:
        return (task / "progress.jsonl").exists()


def test_without_rungs_all_epochs_are_reported_and_nothing_is_stopped(tmp_path: Path) -> None:
    trials = search(tmp_path, Curves(2), 12)
    assert {t.state.name for t in trials} == {"COMPLETE"}
    trained = [t for t in trials if "same_as" not in t.user_attrs]
    assert all(list(t.intermediate_values) == [25, 50, 75, 100] for t in trained)
    assert all(t.intermediate_values[100] == t.value for t in trained)


def test_at_a_rung_the_worse_are_stopped_and_count(tmp_path: Path) -> None:
    sampler = optuna.samplers.RandomSampler(seed=0)
    lines: list[str] = []
    trials = search(tmp_path, Curves(2), 30, lines.append, sampler=sampler, rungs=Rungs((25, 50)))
    assert len(trials) == 30
    stopped = [t for t in trials if t.state.name == "PRUNED"]
    assert 5 < len(stopped) < 28
    assert all(
        t.user_attrs["epochs"] < 4 and t.value == list(t.intermediate_values.values())[-1] for t in stopped
    )
    # What everything is compared with is trained in full.
    assert not any(t.user_attrs[ORIGIN].startswith("uniform") for t in stopped)
    best = max(
        worth(TRACED.cost.mapping(json.loads(t.user_attrs[WIDTHS])), t.user_attrs[SEED]) for t in trials
    )
    assert max(t.value or 0 for t in trials if t.state.name == "COMPLETE") == best
    assert any("stopped early" in line for line in lines)


@pytest.mark.parametrize("text", ["0,50", "25,60", "50,25", "25,75,100", "a", "30,45"])
def test_rungs_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--rungs"):
        Rungs.parse(text)


def test_rungs_are_successive_halving() -> None:
    assert Rungs.parse(None).percents == ()
    assert Rungs.parse("25,50") == Rungs((25, 50))
    assert [Rungs.parse(text).factor for text in ("25", "25,50", "10,30,90")] == [3, 2, 3]
    rungs = Rungs((25, 50))
    assert [rungs.reached(*pair) for pair in ((0, 20), (0, 25), (25, 49), (25, 50), (0, 100))] == [
        False,
        True,
        False,
        True,
        True,
    ]


def test_values_that_must_be_full_are_not_stopped() -> None:
    Rungs((25,)).check("tpe", trains=True)
    Rungs().check("model", trains=True)
    for sampler in ("model", "gp", "nsga2"):
        with pytest.raises(UsageError, match=f"--sampler {sampler}"):
            Rungs((25,)).check(sampler, trains=True)
    with pytest.raises(UsageError, match="trains nothing"):
        Rungs((25,)).check("tpe", trains=False)


def test_the_board_tells_the_best_by_origin(tmp_path: Path) -> None:
    from rich.console import Console

    trials = search(tmp_path, Fake(), 8)
    console = Console(width=100, force_terminal=True, record=True, file=(tmp_path / "terminal").open("w"))
    with Board(lambda line: None, 20, trials, live=True, console=console) as board:
        board.begins(8)
        console.print(board.table())
    text = console.export_text()
    best = max((t for t in trials if t.user_attrs[ORIGIN] == "ModelSampler"), key=lambda t: t.value or 0)
    row = next(line for line in text.splitlines() if "ModelSampler" in line)
    assert f"{best.value:.4g}" in row and str(best.number) in row
    assert "trial 8 of 20" in text and "running: 8" in text and "of training so far" in text
    console.file.close()
