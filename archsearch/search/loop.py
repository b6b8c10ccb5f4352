"""The loop of a search: ask, hand out, tell.

A trial is decided by its widths, the recipe and its seed, and trainings are found again by these. So a
killed search goes on with the same command: trials that were running are picked up first, from the result of
their task or from the last checkpoint of its training, and no number of trials in flight changes what any
of them is worth.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, Trial, TrialState

from archsearch.errors import ArchsearchError
from archsearch.search.board import Board
from archsearch.search.claims import Alone, Claims, tell, unless_ended
from archsearch.search.rungs import EVERYTHING, Rungs
from archsearch.search.sampler import WIDTHS
from archsearch.search.study import ORIGIN, SEED, Start, Surface, counts, enqueue, finished
from archsearch.search.work import Finding, Work
from archsearch.trainer import Say
from archsearch.training.signals import StopRequest, leave

POLL_S = 0.25
"""Pause between two looks at the tasks."""
CLAIMS_EVERY_S = 5.0
"""Pause between two looks at what other drivers left, and at whether they left any room."""
STOPPED = "search stopped by a signal; no trial is lost, and the same command goes on"
FAILURES = 3
"""So many trials in a row that end in an error, or lose worker after worker, are no accident."""

Key = tuple[str, int]


@dataclass
class _Running:
    """A trial that has begun: its widths and seed, and how far it has reported."""

    trial: Trial
    origin: str
    key: Key
    percent: int = 0
    stopped: bool = False


def run(
    study: optuna.Study,
    surface: Surface,
    sampler: BaseSampler,
    work: Work,
    trials: int,
    starts: Sequence[Start],
    seed: int,
    say: Say,
    *,
    rungs: Rungs = EVERYTHING,
    claims: Claims | None = None,
    total: int | None = None,
    observe: Callable[[int], object] = lambda number: None,
) -> None:
    """Go on with a study until it has as many trials as asked for.

    Args:
        study: As ``opened``.
        surface: Where the points are projected to.
        sampler: Chooses the points.
        work: Finds out what widths are worth; the caller closes it.
        trials: Finished ones, those without a value for a reason of their own among them.
        starts: What is looked at first.
        seed: Of the trials that are no start.
        say: Takes lines for the user.
        rungs: Where trials may be stopped.
        claims: Which trials are this driver's, where there are several.
        total: How many trials there will be in the end, for people; these by default.
        observe: Is given the number of each trial when all is known of it, right before its end is told,
            after which Optuna takes nothing more for it.

    Raises:
        KeyboardInterrupt: If SIGINT came.
        PreemptedError: If another signal came; the same call goes on.
        ArchsearchError: What a task's own error says of all tasks, such as a full disk.
    """
    study.sampler, study.pruner = sampler, rungs.pruner
    claims = claims or Alone(study)
    with claims.turn():
        enqueue(study, surface, starts)
    board = Board(say, total or trials, study.get_trials(deepcopy=False), live=work.slots > 1)
    loop = _Loop(study, surface, work, trials, seed, board, rungs, claims, observe)
    work.watch = loop.report
    with StopRequest() as stop, board:
        loop.recover()
        while not loop.done():
            if stop:
                leave(stop.signum, STOPPED)
            if not loop.turn():
                time.sleep(POLL_S)


class _Loop:
    """What is in flight. ``running`` has begun; ``held`` has widths, and waits for a slot or a twin."""

    def __init__(
        self,
        study: optuna.Study,
        surface: Surface,
        work: Work,
        trials: int,
        seed: int,
        board: Board,
        rungs: Rungs,
        claims: Claims,
        observe: Callable[[int], object],
    ) -> None:
        self._study, self._surface, self._work, self._trials = study, surface, work, trials
        self._seed, self._board, self._rungs, self._claims = seed, board, rungs, claims
        self._observe = observe
        self._running: dict[int, _Running] = {}
        self._held: list[_Running] = []
        self._failures = 0
        self._looked_at_s = time.monotonic()
        self._asks = True

    def done(self) -> bool:
        """Return whether all trials have ended; the study is asked only where others may tell it."""
        return not self._running and not self._held and finished(self._study) >= self._trials

    def recover(self) -> None:
        """Pick up the trials that this driver was at when it was killed."""
        running = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        self._adopt([trial for trial in running if self._claims.mine(trial)])

    def turn(self) -> bool:
        """Tell what has ended, begin what there is room for; return whether anything moved."""
        moved = [self._collect(number) for number in list(self._running)]
        if time.monotonic() - self._looked_at_s > CLAIMS_EVERY_S:
            self._adopt(self._claims.left())
            self._looked_at_s, self._asks = time.monotonic(), True
        return any(moved) | self._begin_held() | self._ask()

    def report(self, number: int) -> None:
        """Report how far a trial has come, and stop it at a rung where others were better."""
        with unless_ended():  # by another driver
            self._report(number, self._running[number])

    def _report(self, number: int, each: _Running) -> None:
        for percent, accuracy in self._work.progress(number).items():
            if percent <= each.percent:
                continue
            each.trial.report(accuracy, percent)
            rung = self._rungs.reached(each.percent, percent)
            each.percent = percent
            # The first architectures are what all others are compared with.
            searched = each.origin == type(self._study.sampler).__name__
            if rung and searched and percent < 100 and not each.stopped and each.trial.should_prune():
                each.stopped = True
                self._work.stop(number)

    def _adopt(self, trials: Sequence[FrozenTrial]) -> None:
        for trial in trials:
            again, facts = Trial(self._study, trial._trial_id), trial.user_attrs
            if WIDTHS not in facts:  # its driver died right after it asked
                self._held.append(self._described(again))
                continue
            key = (facts[WIDTHS], facts[SEED])
            percent = max(trial.intermediate_values, default=0)
            self._held.append(_Running(again, facts[ORIGIN], key, percent))

    def _ask(self) -> bool:
        """Ask for one trial and begin it: with work that is done at once, signals are seen in between."""
        if not self._asks or len(self._running) + len(self._held) >= self._work.slots:
            return False
        trial = self._claims.ask(self._has_room)
        if trial is None:
            self._asks = False
            return False
        self._held.append(self._described(trial))
        self._begin_held()
        return True

    def _has_room(self) -> bool:
        trials = self._study.get_trials(deepcopy=False)
        return sum(t.state == TrialState.RUNNING or counts(t) for t in trials) < self._trials

    def _described(self, trial: Trial) -> _Running:
        """Draw a trial's point, and write down what it is."""
        widths = self._surface.suggest(trial)
        given = trial.user_attrs
        facts: dict[str, Any] = {
            ORIGIN: given.get(ORIGIN, type(self._study.sampler).__name__),
            SEED: given.get(SEED, self._seed),
            # The widths come last: where a trial has them, it has all of these.
            **self._surface.facts(widths),
        }
        for name, fact in facts.items():
            trial.set_user_attr(name, fact)
        return _Running(trial, facts[ORIGIN], (facts[WIDTHS], facts[SEED]))

    def _begin_held(self) -> bool:
        """Begin what waits; widths and a seed that a trial had are not trained again."""
        moved = False
        for each in list(self._held):
            at_work = [other.key for other in self._running.values()]
            if each.key in at_work or len(at_work) >= self._work.slots:
                continue
            self._held.remove(each)
            moved = True
            number = each.trial.number
            self._running[number] = each
            if (known := self._known(each.key)) is not None:
                self._end(number, known)
                continue
            self._board.begins(number)
            self._work.begin(number, self._surface.cost.mapping(json.loads(each.key[0])), each.key[1])
            self._collect(number)
        return moved

    def _known(self, key: Key) -> Finding | None:
        """Return what an earlier trial with the same widths and seed has found."""
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            facts = trial.user_attrs
            if (facts.get(WIDTHS), facts.get(SEED)) == key:
                found: dict[str, Any] = {"seconds": 0.0, "same_as": trial.number}
                found |= {name: facts[name] for name in ("epochs", "training") if name in facts}
                return Finding(trial.value, facts=found)
        return None

    def _collect(self, number: int) -> bool:
        """Tell a trial's end, if it has ended."""
        finding = self._work.found(number)
        self.report(number)
        if finding is not None:
            self._end(number, finding)
        return finding is not None

    def _end(self, number: int, finding: Finding) -> None:
        if (shared := finding.shared()) is not None:
            raise shared
        if finding.reason is not None:
            self._failed(number, *finding.reason)
            return
        self._failures = 0
        each = self._running.pop(number)
        with unless_ended():
            for name, fact in finding.facts.items():
                each.trial.set_user_attr(name, fact)
        if finding.stopped:
            self._tell(number, state=TrialState.PRUNED)
        else:
            self._tell(number, finding.value)

    def _failed(self, number: int, name: str, why: str) -> None:
        """Give up a trial for a reason of its own."""
        trial = self._running.pop(number).trial
        with unless_ended():
            trial.set_user_attr(name, why[:1000])
        self._tell(number, state=TrialState.FAIL)
        self._failures = self._failures + 1 if name != "diverged" else 0
        if self._failures >= FAILURES:
            raise ArchsearchError(
                f"{FAILURES} trials in a row had no result; the last one, trial {number}: {why}"
            )

    def _tell(self, number: int, value: float | None = None, state: TrialState | None = None) -> None:
        with unless_ended():
            self._observe(number)
        tell(self._study, number, value, state)
        self._board.ended(number, self._study.get_trials(deepcopy=False))
