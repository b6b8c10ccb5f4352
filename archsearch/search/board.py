"""What a person sees of a running search: a live table on a terminal, else a line a trial."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.live import Live
from rich.table import Table

from archsearch.search.study import ORIGIN, REASONS, counts
from archsearch.trainer import Say


class Board:
    """Keeps count of a study's trials; a context in which a live table may stand.

    Args:
        say: Takes lines for the user.
        trials: How many there will be.
        before: Those that there are.
        live: Whether a table may stand: not where a training in this process has a bar of its own.
        console: Where; standard error by default.
    """

    def __init__(
        self,
        say: Say,
        trials: int,
        before: Sequence[FrozenTrial],
        *,
        live: bool = False,
        console: Console | None = None,
    ) -> None:
        self._say, self._trials = say, trials
        self._console = console or Console(stderr=True)
        self._live = (
            Live(console=self._console, transient=True) if live and self._console.is_terminal else None
        )
        self._since_s = time.monotonic()
        self._ended = _ended(before)
        self._before = frozenset(self._ended)
        self._running: list[int] = []

    def __enter__(self) -> Board:  # noqa: PYI034  # typing.Self is Python 3.11
        if self._live is not None:
            self._live.start()
            self._show()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def begins(self, number: int) -> None:
        """Note that a trial has begun."""
        self._running.append(number)
        self._show()

    def ended(self, number: int, trials: Sequence[FrozenTrial]) -> None:
        """Say how a trial ended.

        Args:
            number: Of the trial.
            trials: All of the study by now; other drivers may have ended some of them.
        """
        if number in self._running:
            self._running.remove(number)
        self._ended = _ended(trials)
        if self._live is None:
            told = _told(trials[number])
            self._say(f"trial {len(self._ended)} of {self._trials}: {told}{self._rate()}")
        self._show()

    def table(self) -> Table:
        """Return the best values so far by origin."""
        table = Table(title=f"trial {len(self._ended)} of {self._trials}{self._rate()}", title_justify="left")
        for heading in ("origin", "trials", "best", "mean", "trial"):
            table.add_column(heading, justify="left" if heading == "origin" else "right")
        for origin, trials in self._by_origin().items():
            best = max(trials, key=lambda trial: trial.value or 0.0)
            values = [trial.value or 0.0 for trial in trials]
            mean = sum(values) / len(values)
            table.add_row(origin, str(len(trials)), f"{best.value:.4g}", f"{mean:.4g}", str(best.number))
        without = sum(trial.state != TrialState.COMPLETE for trial in self._ended.values())
        table.caption = f"running: {', '.join(map(str, sorted(self._running))) or 'none'}" + (
            f"; stopped or failed: {without}" if without else ""
        )
        return table

    def _by_origin(self) -> Mapping[str, list[FrozenTrial]]:
        found: dict[str, list[FrozenTrial]] = {}
        for trial in self._ended.values():
            if trial.state == TrialState.COMPLETE:
                found.setdefault(trial.user_attrs.get(ORIGIN, "?"), []).append(trial)
        return found

    def _rate(self) -> str:
        """Return trials an hour, the time that is left, and the training seconds of all trials so far."""
        spent_s = sum(trial.user_attrs.get("seconds", 0.0) for trial in self._ended.values())
        cost = f", {_duration(spent_s)} of training so far" if spent_s else ""
        hours = (time.monotonic() - self._since_s) / 3600
        left = self._trials - len(self._ended)
        new = [t for number, t in self._ended.items() if number not in self._before]
        trained = sum("same_as" not in trial.user_attrs for trial in new)
        if not trained or left <= 0 or hours <= 0:
            return cost
        rate = trained / hours
        shown = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        return f"; {shown} trials an hour, about {_duration(3600 * left / rate)} left{cost}"

    def _show(self) -> None:
        if self._live is not None:
            self._live.update(self.table())


def _ended(trials: Sequence[FrozenTrial]) -> dict[int, FrozenTrial]:
    return {trial.number: trial for trial in trials if counts(trial)}


def _told(trial: FrozenTrial) -> str:
    facts: Mapping[str, Any] = trial.user_attrs
    for reason in REASONS:
        if reason in facts:
            return str(facts[reason])
    stopped = ", stopped early" if trial.state == TrialState.PRUNED else ""
    same = f", as trial {facts['same_as']}" if "same_as" in facts else ""
    value = "no value" if trial.value is None else f"{trial.value:.4g}"
    return f"{value} ({facts[ORIGIN]}, {facts['macs_kept']:.4f} of the MACs{stopped}{same})"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
