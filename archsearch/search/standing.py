"""How a search stands: ``archsearch search status|best|export``. Nothing is written into its directory."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from archsearch.architecture import Architecture
from archsearch.errors import UsageError
from archsearch.latency.library import TABLE
from archsearch.latency.table import LatencyTable
from archsearch.rebuild import Traced, trace_architecture
from archsearch.search.export import UNIFORM
from archsearch.search.facts import noise_of, told_by
from archsearch.search.posterior import Posterior
from archsearch.search.presence import WATCH_S, Presence
from archsearch.search.reading import reading
from archsearch.search.sampler import WIDTHS
from archsearch.search.study import ORIGIN, counts
from archsearch.stopwatch import predicted

RESULTS = "results.json"
RECENT = 20
"""So many of the last trials say how long the next ones take."""


@dataclass(frozen=True)
class Standing:
    """A search as it is now.

    Attributes:
        run: Its directory.
        facts: What is searched.
        trials: All of them.
        posterior: What the model believes, once it was asked.
        presence: Who is at work on it.
    """

    run: Path
    facts: Mapping[str, Any]
    trials: tuple[FrozenTrial, ...]
    posterior: Posterior | None
    presence: Presence

    @classmethod
    def read(cls, run: Path) -> Standing:
        """Look at a run directory; a search may be running there.

        Where drivers share its study and none of them holds this directory, this takes until one beats.

        Raises:
            UsageError: If there is no search.
        """
        with reading(run) as study:
            facts = told_by(study)
            if facts is None:
                raise UsageError(f"{run}: the search has not begun its trials yet: look again later")
            trials = tuple(study.get_trials(deepcopy=False))
            standing = cls(run, facts, trials, Posterior.read(run), Presence(False))
            # Where all has ended here, nobody waits to hear whether other drivers are at their finals.
            watch_s = 0.0 if standing.has_ended else WATCH_S
            return replace(standing, presence=Presence.of(run, study, trials, watch_s))

    @property
    def has_ended(self) -> bool:
        """Whether all trials have ended, and finals were held."""
        return sum(map(counts, self.trials)) >= self.facts["trials"] and (self.run / RESULTS).exists()

    def status(self) -> Iterable[str]:
        """Yield what a person wants to know, in lines."""
        done = [trial for trial in self.trials if counts(trial)]
        states = Counter(map(self._state, self.trials))
        yield f"{self.facts['model']} on {self.facts['data']}, {', '.join(self.facts['targets'])}"
        yield (
            f"{len(done)} of {self.facts['trials']} trials have ended "
            f"({', '.join(f'{count} {state}' for state, count in sorted(states.items()))})"
        )
        valued = [trial for trial in done if trial.value is not None]
        if valued:
            best = max(valued, key=_value)
            yield (
                f"highest value: {_value(best):.4g}, trial {best.number} ({best.user_attrs[ORIGIN]}); "
                "the luckiest of many, not a result"
            )
        if len(valued) > 1:
            yield noise_of(valued)
        spent = sum(trial.user_attrs.get("seconds", 0.0) for trial in self.trials)
        yield f"training so far: {_time(spent)}"
        if not self.presence:
            yield (
                f"ended: the results are in {self.run / RESULTS}"
                if self.has_ended
                else "no driver is at work: the same command goes on"
            )
        elif (left := self._left(done)) is not None:
            yield f"about {_time(left)} left, as the last trials took, and the finals"

    def best(self, *, trust_code: bool = False) -> str:
        """Return the recommended widths, what the model expects of them and what they cost, in lines.

        Args:
            trust_code: As for ``export``.

        Raises:
            UsageError: If there is no recommendation yet.
        """
        found = self._recommended()
        sizes = dict(self.facts["groups"])
        unit = " points" if self.facts["objective"] != "proxy" else ""
        cost = self._traced(found.recommended, trust_code).cost
        expected = (
            f"expected gain over uniform widths: {found.gain.mean:+.2f}{unit}, "
            f"{found.gain.low:+.2f} to {found.gain.high:+.2f} with 95 % by what the model believes; "
            f"noise of a trial {found.noise:.2g}"
        )
        lines = [
            f"not a result: the finals decide. {found.trials} trials have a value by now",
            expected,
            f"{cost.of(found.recommended).macs:,} MACs, {cost.of(found.recommended).params:,} parameters",
            *self._latency(found.recommended),
            *(f"{name}: {width} of {sizes[name]}" for name, width in found.recommended.items()),
        ]
        return "\n".join(lines)

    def export(self, path: Path, trial: int | None = None, *, trust_code: bool = False) -> Architecture:
        """Write an architecture file of the recommendation, or of a trial.

        Args:
            path: The file.
            trial: Number of the trial.
            trust_code: Whether a model that names the user's own code may be imported.

        Raises:
            UsageError: If there is no such trial, or no recommendation yet.
        """
        widths = self._recommended().recommended if trial is None else self._widths(trial)
        traced = self._traced(widths, trust_code)
        provenance = {
            "method": "search",
            "target": ", ".join(self.facts["targets"]),
            "widths of": "the model's recommendation, not in finals" if trial is None else f"trial {trial}",
            "data": self.facts["data"],
        }
        architecture = traced.architecture(widths, provenance)
        architecture.write(path)
        return architecture

    def _recommended(self) -> Posterior:
        if self.posterior is None:
            raise UsageError(f"{self.run}: the model recommends nothing yet: look again after a few trials")
        return self.posterior

    def _widths(self, number: int) -> dict[str, int]:
        if not 0 <= number < len(self.trials) or WIDTHS not in self.trials[number].user_attrs:
            raise UsageError(f"--trial {number}: has no widths; trials are 0 to {len(self.trials) - 1}")
        widths = json.loads(self.trials[number].user_attrs[WIDTHS])
        return {name: width for (name, _), width in zip(self.facts["groups"], widths, strict=True)}

    def _traced(self, widths: Mapping[str, int], trust_code: bool) -> Traced:
        """Return the reference, with the branches that may vanish where one has in these widths."""
        path = self.run / UNIFORM
        traced = trace_architecture(Architecture.read(path), trust_code=trust_code, where=str(path))
        return traced.with_branches() if 0 in widths.values() and not traced.graph.branches else traced

    def _latency(self, widths: Mapping[str, int]) -> Iterator[str]:
        """Yield what the latency table of the search says of some widths, in a line; nothing without one."""
        path = self.run / TABLE
        if not path.exists():
            return
        seen = predicted(LatencyTable.read(path), widths)
        share = seen["predicted_ms"] / seen["reference_ms"]
        yield (
            f"predicted latency: {seen['predicted_ms']:.4g} ms, {seen['low_ms']:.4g} to "
            f"{seen['high_ms']:.4g} with 90 %; {share:.3f} of the reference. What is measured may differ"
        )

    def _state(self, trial: FrozenTrial) -> str:
        if trial.state == TrialState.RUNNING and not self.presence.carries_out(trial):
            return "interrupted"
        return trial.state.name.lower()

    def _left(self, done: list[FrozenTrial]) -> float | None:
        """Return how many seconds the rest of the trials will take, if one is running."""
        running = any(self._state(trial) == "running" for trial in self.trials)
        ends = sorted(trial.datetime_complete for trial in done if trial.datetime_complete is not None)
        ends = ends[-RECENT - 1 :]
        if not running or len(ends) < 2:
            return None
        each_s = (ends[-1] - ends[0]).total_seconds() / (len(ends) - 1)
        return float(each_s * (self.facts["trials"] - len(done)))


def _value(trial: FrozenTrial) -> float:
    return float("-inf") if trial.value is None else trial.value


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
