"""Whether somebody is at work on a search, seen from outside: nothing is written and nobody is asked."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState

from archsearch import files
from archsearch.search.claims import BEAT_S, DRIVER, beats, noted

WATCH_S = 1.5 * BEAT_S
"""A driver that does not beat for so long is not at work, or its server is away."""
POLL_S = 0.25


@dataclass(frozen=True)
class Presence:
    """Who is at work.

    Attributes:
        here: Whether a driver holds the run directory.
        drivers: Names of the living drivers of a study that several share; else empty.
        shared: Whether it is such a study.
    """

    here: bool
    drivers: frozenset[str] = frozenset()
    shared: bool = False

    def __bool__(self) -> bool:
        return self.here or bool(self.drivers)

    def carries_out(self, trial: FrozenTrial) -> bool:
        """Return whether a trial that is called running has a driver."""
        return trial.user_attrs.get(DRIVER) in self.drivers if self.shared else self.here

    @classmethod
    def of(
        cls, run: Path, study: optuna.Study, trials: Sequence[FrozenTrial], watch_s: float = WATCH_S
    ) -> Presence:
        """Look at a run directory and, where drivers share the study, watch the others for a beat or so.

        Args:
            run: The directory.
            study: Its study.
            trials: Of the study.
            watch_s: How long a beat is waited for.
        """
        here, note = files.is_held(run), noted(run)
        if not note:
            return cls(here)
        running = [trial for trial in trials if trial.state == TrialState.RUNNING]
        owners = {trial.user_attrs[DRIVER] for trial in running if DRIVER in trial.user_attrs}
        living = {note[DRIVER]} if here else set()
        first, end_s = beats(study), time.monotonic() + watch_s
        while not (living and owners <= living) and time.monotonic() < end_s:
            time.sleep(POLL_S)
            living |= {driver for driver, beat in beats(study).items() if beat != first.get(driver)}
        return cls(here, frozenset(living), shared=True)
