"""The study of a search: one driver asks, trains and tells; what it knows is in one SQLite file.

A trial is decided by its widths, the recipe and its seed, and trainings are found again by these. So a
killed search goes on with the same command: the trial that was running is finished first, from the last
checkpoint of its training.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import Trial, TrialState
from sqlalchemy.engine import URL

from archsearch import files
from archsearch.cost import CostModel
from archsearch.errors import DivergedError, IntegrityError
from archsearch.search.project import REACH, free_groups, logits, project
from archsearch.search.sampler import WIDTHS
from archsearch.space import Widths
from archsearch.targets import Target
from archsearch.trainer import Say

FILE = "study.db"
ORIGIN, SEED, DIVERGED, IDENTITY = "origin", "seed", "diverged", "identity"

Value = Callable[[Mapping[str, int], int], float]
"""Returns what widths are worth, given a seed; larger is better."""


@dataclass(frozen=True)
class Start:
    """An architecture that a search looks at first, and where it comes from."""

    origin: str
    widths: Mapping[str, int]
    seed: int


@dataclass(frozen=True)
class Surface:
    """What a search may choose.

    Attributes:
        cost: The costs as functions of the widths.
        allowed: The widths that each group may have, rising.
        targets: What each trial meets.
    """

    cost: CostModel
    allowed: Mapping[str, Widths]
    targets: Sequence[Target]

    @property
    def names(self) -> list[str]:
        """The groups that have a choice, in the order of the costs' columns."""
        return [name for name in self.cost.names if name in free_groups(self.allowed)]

    def suggest(self, trial: Trial) -> dict[str, int]:
        """Return the widths of a trial: its parameters, projected."""
        x = {name: trial.suggest_float(name, -REACH, REACH) for name in self.names}
        return project(x, self.cost, self.allowed, self.targets)


@contextlib.contextmanager
def opened(directory: Path, identity: Mapping[str, Any]) -> Iterator[optuna.Study]:
    """Open the study of a run directory, which is this process's alone until the end.

    Args:
        directory: Is created if need be.
        identity: What decides the values, as plain data.

    Raises:
        StorageError: If another process searches there.
        IntegrityError: If the study there is another one; names the first field that differs.
    """
    files.probe(directory, 2**22)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = (directory / FILE).resolve()
    url = URL.create("sqlite", database=str(path)).render_as_string()
    with files.lock(directory):
        storage = optuna.storages.RDBStorage(url)
        try:
            study = optuna.create_study(
                study_name="search", storage=storage, direction="maximize", load_if_exists=True
            )
            _check(study, json.loads(json.dumps(identity)), path)
            yield study
        finally:
            storage.engine.dispose()


def _check(study: optuna.Study, identity: Mapping[str, Any], path: Path) -> None:
    before = study.user_attrs.get(IDENTITY)
    if before is None:
        study.set_user_attr(IDENTITY, dict(identity))
        return
    for field in [*identity, *before]:
        if before.get(field) != identity.get(field):
            raise IntegrityError(
                f"{path}: is another search: {field} was {before.get(field)!r} and now is "
                f"{identity.get(field)!r}; give another --out, or delete this study"
            )


def run(
    study: optuna.Study,
    surface: Surface,
    sampler: BaseSampler,
    value: Value,
    trials: int,
    starts: Sequence[Start],
    seed: int,
    say: Say,
) -> None:
    """Go on with a study until it has as many trials as asked for.

    Args:
        study: As ``opened``.
        surface: Where the points are projected to.
        sampler: Chooses the points.
        value: What widths are worth.
        trials: Finished ones, those that diverged among them.
        starts: What is looked at first.
        seed: Of the trials that are no start.
        say: Takes lines for the user.
    """
    study.sampler = sampler
    _recover(study, surface, value)
    _enqueue(study, surface, starts)
    while (done := finished(study)) < trials:
        trial = study.ask()
        widths = surface.suggest(trial)
        cost, reference = surface.cost.of(widths), surface.cost.reference
        facts = {
            ORIGIN: trial.user_attrs.get(ORIGIN, type(sampler).__name__),
            SEED: trial.user_attrs.get(SEED, seed),
            "macs": cost.macs,
            "macs_kept": cost.macs / reference.macs,
            "params": cost.params,
            # Last: where a trial has widths, it has all of these.
            WIDTHS: json.dumps(surface.cost.array(widths).tolist()),
        }
        for name, fact in facts.items():
            trial.set_user_attr(name, fact)
        try:
            found = value(widths, facts[SEED])
        except DivergedError as error:
            trial.set_user_attr(DIVERGED, str(error))
            study.tell(trial, state=TrialState.FAIL)
            say(f"trial {done + 1} of {trials}: {error}")
            continue
        study.tell(trial, found)
        say(
            f"trial {done + 1} of {trials}: {found:.4g} "
            f"({facts[ORIGIN]}, {facts['macs_kept']:.4f} of the MACs)"
        )


def finished(study: optuna.Study) -> int:
    """Return how many trials have ended: with a value, or diverged."""
    ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.FAIL))
    return sum(trial.state == TrialState.COMPLETE or DIVERGED in trial.user_attrs for trial in ended)


def _recover(study: optuna.Study, surface: Surface, value: Value) -> None:
    """Finish the trial that a killed driver was at; one that had no widths yet is given up."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        try:
            if WIDTHS not in trial.user_attrs:
                study.tell(trial.number, state=TrialState.FAIL)
                continue
            widths = surface.cost.mapping(json.loads(trial.user_attrs[WIDTHS]))
            study.tell(trial.number, value(widths, trial.user_attrs[SEED]))
        except DivergedError:
            study.tell(trial.number, state=TrialState.FAIL)


def _enqueue(study: optuna.Study, surface: Surface, starts: Sequence[Start]) -> None:
    lost = (TrialState.FAIL,)
    known = {
        (trial.user_attrs.get(ORIGIN), trial.user_attrs.get(SEED))
        for trial in study.get_trials(deepcopy=False)
        if trial.state not in lost or DIVERGED in trial.user_attrs
    }
    for start in starts:
        if (start.origin, start.seed) not in known:
            study.enqueue_trial(
                logits(start.widths, surface.allowed),
                user_attrs={ORIGIN: start.origin, SEED: start.seed},
            )
