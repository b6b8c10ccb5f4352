"""The study of a search: one driver asks, trains and tells; what it knows is in one SQLite file.

A trial is decided by its widths, the recipe and its seed, and trainings are found again by these. So a
killed search goes on with the same command: the trial that was running is finished first, from the last
checkpoint of its training.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.engine import URL

from archsearch import files
from archsearch.cost import CostModel
from archsearch.errors import IntegrityError
from archsearch.latency.table import LatencyTable
from archsearch.search import storage
from archsearch.search.claims import Claims, claims
from archsearch.search.project import REACH, free_groups, logits, project
from archsearch.search.sampler import WIDTHS
from archsearch.space import Widths
from archsearch.stopwatch import predicted
from archsearch.targets import Target
from archsearch.trainer import Say

ORIGIN, SEED, IDENTITY = "origin", "seed", "identity"
UNIFORM = "uniform"
"""The origin of uniform widths; those with further seeds have an origin that begins so."""

REASONS = ("diverged", "error", "lost")
"""The user attributes that say why a trial ended without a value."""


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
        table: Of the device whose latency counts, if one does.
    """

    cost: CostModel
    allowed: Mapping[str, Widths]
    targets: Sequence[Target]
    table: LatencyTable | None = None

    @property
    def names(self) -> list[str]:
        """The groups that have a choice, in the order of the costs' columns."""
        return [name for name in self.cost.names if name in free_groups(self.allowed)]

    def suggest(self, trial: Trial) -> dict[str, int]:
        """Return the widths of a trial: its parameters, projected."""
        x = {name: trial.suggest_float(name, -REACH, REACH) for name in self.names}
        return project(x, self.cost, self.allowed, self.targets)

    def facts(self, widths: Mapping[str, int]) -> dict[str, Any]:
        """Return what widths cost, as user attributes of a trial; the widths themselves come last."""
        cost, reference = self.cost.of(widths), self.cost.reference
        found: dict[str, Any] = {
            "macs": cost.macs,
            "macs_kept": cost.macs / reference.macs,
            "params": cost.params,
        }
        if self.table is not None:
            seen = predicted(self.table, widths)
            found |= {
                "latency_ms": seen["predicted_ms"],
                "latency_low_ms": seen["low_ms"],
                "latency_high_ms": seen["high_ms"],
                "latency_kept": seen["predicted_ms"] / seen["reference_ms"],
            }
        return {**found, WIDTHS: json.dumps(self.cost.array(widths).tolist())}


@contextlib.contextmanager
def joined(
    directory: Path, identity: Mapping[str, Any], url: URL | None = None, say: Say = lambda line: None
) -> Iterator[tuple[optuna.Study, Claims]]:
    """Open the study of a run directory, which is this process's alone until the end.

    Args:
        directory: Is created if need be.
        identity: What decides the values, as plain data.
        url: Of a database that drivers share, each with a run directory of its own.
        say: Takes lines for the user.

    Yields:
        The study, and what says which of its trials are this driver's.

    Raises:
        StorageError: If another process searches there, or the database cannot be reached.
        IntegrityError: If the study there is another one; names the first field that differs.
    """
    files.probe(directory, 2**22)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    plain = json.loads(json.dumps(identity))
    with files.lock(directory), storage.storage(directory, url, say) as place:
        files.sweep(directory)
        study = optuna.create_study(
            study_name=storage.study_name(url, plain),
            storage=place,
            direction="maximize",
            load_if_exists=True,
        )
        where = directory / storage.FILE if url is None else storage.named(url)
        with claims(study, place, directory) as claimed:
            with claimed.turn():
                _check(study, plain, str(where))
            yield study, claimed


@contextlib.contextmanager
def opened(directory: Path, identity: Mapping[str, Any]) -> Iterator[optuna.Study]:
    """Open the study of a run directory as its only driver; arguments and errors as of ``joined``."""
    with joined(directory, identity) as (study, _):
        yield study


def _check(study: optuna.Study, identity: Mapping[str, Any], where: str) -> None:
    before = study.user_attrs.get(IDENTITY)
    # A search that failed before its first trial may be given again with other settings.
    if before is None or not study.get_trials(deepcopy=False):
        study.set_user_attr(IDENTITY, dict(identity))
    elif (found := _difference(before, identity)) is not None:
        raise IntegrityError(f"{where}: is another search: {found}; give another --out, or delete this study")


def _difference(before: Any, now: Any, field: str = "") -> str | None:
    """Return the first field that differs, as deep in mappings as it is, with both values."""
    if not isinstance(before, Mapping) or not isinstance(now, Mapping):
        return None if before == now else f"{field} was {before!r} and now is {now!r}"
    fields = {name: f"{field}.{name}" if field else name for name in [*now, *before]}
    found = (_difference(before.get(name), now.get(name), each) for name, each in fields.items())
    return next(filter(None, found), None)


def is_uniform(trial: FrozenTrial) -> bool:
    """Return whether a trial is one of uniform widths, which show the noise."""
    return str(trial.user_attrs.get(ORIGIN, "")).startswith(UNIFORM)


def is_chosen(trial: FrozenTrial) -> bool:
    """Return whether a sampler chose the point of a trial, not somebody who enqueued it."""
    return str(trial.user_attrs.get(ORIGIN, "")).endswith("Sampler")


def finished(study: optuna.Study) -> int:
    """Return how many trials have ended: with a value, stopped early, or with a reason for having none."""
    return sum(counts(trial) for trial in study.get_trials(deepcopy=False))


def counts(trial: FrozenTrial) -> bool:
    """Return whether a trial has ended and is one of those asked for.

    One that failed without a reason is the remainder of a driver that was killed before it had claimed it.
    """
    if trial.state == TrialState.FAIL:
        return any(reason in trial.user_attrs for reason in REASONS)
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED)


def enqueue(study: optuna.Study, surface: Surface, starts: Sequence[Start]) -> None:
    """Enqueue the architectures that a search looks at first, unless they are there."""
    known = {
        (trial.user_attrs.get(ORIGIN), trial.user_attrs.get(SEED))
        for trial in study.get_trials(deepcopy=False)
        if trial.state != TrialState.FAIL or counts(trial)
    }
    for start in starts:
        if (start.origin, start.seed) not in known:
            study.enqueue_trial(
                logits(start.widths, surface.allowed),
                user_attrs={ORIGIN: start.origin, SEED: start.seed},
            )
