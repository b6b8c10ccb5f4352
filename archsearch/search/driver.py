"""``archsearch search``: from a reference to an architecture that held its own against uniform widths."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from archsearch.errors import UsageError
from archsearch.latency.library import TABLE
from archsearch.on_device import TargetDevice, aimed
from archsearch.pipeline import Found
from archsearch.pruning import uniform_widths
from archsearch.rebuild import Traced
from archsearch.search.artifacts import annotate, annotate_trial
from archsearch.search.baselines import Solve, baseline
from archsearch.search.calibrate import calibrated
from archsearch.search.crew import Crew
from archsearch.search.export import exported, finalist_file, record_of, write_finalist
from archsearch.search.facts import CALIBRATION, FACTS, facts_of, facts_of_trials, noise_of
from archsearch.search.finals import Finalist, Outcome, best_trials, finals
from archsearch.search.loop import run
from archsearch.search.model import AdditiveModel
from archsearch.search.objectives import OBJECTIVES
from archsearch.search.page import write_plots
from archsearch.search.pairs import PairedModel
from archsearch.search.pictures import missing
from archsearch.search.posterior import Posterior
from archsearch.search.quest import Quest
from archsearch.search.reference import Reference
from archsearch.search.sampler import Told, make_sampler, told
from archsearch.search.storage import address
from archsearch.search.study import Start, Surface, joined
from archsearch.search.trial import Scratch
from archsearch.search.worth import Worth
from archsearch.settling import Facts, missed, settle
from archsearch.stopwatch import Stopwatch, note, verdict
from archsearch.targets import Target
from archsearch.trainer import Say, Trainer

__all__ = ["Driver", "Quest", "Searched", "search"]

NOISE_SEEDS = 3
"""How often uniform widths are trained, so that the noise shows before anything is believed."""

REFRESH = 10
"""After so many trials people can see again what the model recommends."""


@dataclass(frozen=True)
class Searched(Found):
    """What a search gives; nothing of the found network is inherited, so that it has no selection.

    Attributes:
        outcome: The finalists and what was decided.
    """

    outcome: Outcome


def search(traced: Traced, quest: Quest, trainer: Trainer, *, out: Path, **more: Any) -> Searched:
    """Search the widths that train best at a target; the same call goes on where it was killed.

    Args:
        traced: The reference network.
        quest: How to search.
        trainer: Trains, and keeps what it trained.
        out: Directory of the study and the results.
        more: Further arguments of ``Driver``.

    Raises:
        InfeasibleError: If no allowed widths meet the targets; before anything is trained.
        ArchsearchError: If the study in ``out`` is another one, or in use.
    """
    driver = Driver(traced, quest, trainer, out=out, **more)
    with driver.at_work():
        driver.explore()
        return driver.finish()


class Driver:
    """One search: what is known before its first trial, and what is done with its study.

    Args:
        traced: The reference network.
        quest: How to search.
        trainer: Trains, and keeps what it trained.
        out: Directory of the study and the results.
        weights: File with the reference's weights, which is then not trained.
        trained: Whether the reference's weights, as they are, are trained ones.
        device: Whose latency counts, with a latency target.
        trust_code: Whether a model that names the user's own code may be imported to be measured.
        crew: Who trains the networks; by default this process.
        storage: Address of a database that several drivers share; by default a file in ``out``.
        conditions: What else to record.
        say: Takes lines for the user.

    Raises:
        InfeasibleError: If no allowed widths meet the targets.
    """

    def __init__(
        self,
        traced: Traced,
        quest: Quest,
        trainer: Trainer,
        *,
        out: Path,
        weights: str | None = None,
        trained: bool = False,
        device: TargetDevice | None = None,
        trust_code: bool = False,
        crew: Crew | None = None,
        storage: str | None = None,
        conditions: Mapping[str, Any] | None = None,
        say: Say = lambda line: None,
    ) -> None:
        plan = quest.plan
        if device is not None:
            traced, space = aimed(traced, plan.space, device.table)
            plan = replace(plan, space=space)
        if plan.drops_branches(traced.graph.sizes):
            traced = traced.with_branches()
        self._traced, self._quest, self._plan = traced, replace(quest, plan=plan), plan
        table = device.table if device is not None else None
        self._surface = Surface(traced.cost, plan.space.allowed(traced.graph), plan.targets, table)
        # An impossible target shows here, before anything is trained.
        self._uniform = uniform_widths(traced.cost, self._surface.allowed, list(plan.targets))
        self._url = address(storage)
        # Another driver trains the same reference and finalists.
        self._trainer = replace(trainer, waits=self._url is not None)
        blind = self._trainer.blinded()
        scratch = Scratch(traced, plan.recipe, plan.budget, published_cost=plan.published_cost)
        self._reference = Reference(traced, plan, blind, weights, trained=trained)
        self._worth = Worth(traced, self._reference, scratch, blind, crew or Crew(), out, say)
        self._out, self._weights, self._trained = out, weights, trained
        self._clock = None if device is None else Stopwatch(device, trainer.store, trust_code, say)
        self._conditions, self._say = conditions or {}, say

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Hold the study, as its only driver in this run directory; all else is done in here.

        Raises:
            ArchsearchError: If the study in the directory is another one, or in use.
        """
        with joined(self._out, self._identity(), self._url, self._say) as (self._study, self._claims):
            write_finalist(self._traced, "uniform", self._uniform, self._out)
            if self._surface.table is not None:
                self._surface.table.write(self._out / TABLE)
            self._study.set_user_attr(FACTS, self._facts())
            annotate(self._study, self._out)
            yield

    def explore(self) -> None:
        """Evaluate the trials: uniform widths first, which show the noise."""
        quest, seed, study = self._quest, self._plan.seed, self._study
        if quest.calibrate:
            found = calibrated(quest, self._surface, self._worth)
            study.set_user_attr(CALIBRATION, found.facts())
            for line in found.lines():
                self._say(line)
        starts = [Start("uniform", self._uniform, seed)]
        noisy = OBJECTIVES[quest.objective].trains
        if noisy:
            starts += [Start("uniform, again", self._uniform, seed + more) for more in range(1, NOISE_SEEDS)]
        starts += [Start(name, solve(self._plan.targets), seed) for name, solve in self._baselines.items()]
        sampler = make_sampler(
            quest.sampler,
            self._surface.names,
            seed,
            len(study.trials) + self._claims.salt,
            self._model,
            self._surface.allowed,
            quest.thompson,
        )
        with contextlib.closing(self._worth.work(quest)) as work:
            for trials in [NOISE_SEEDS] * (noisy and quest.trials > NOISE_SEEDS) + [quest.trials]:
                run(
                    study,
                    self._surface,
                    sampler,
                    work,
                    trials,
                    starts,
                    seed,
                    self._say,
                    rungs=quest.rungs,
                    claims=self._claims,
                    total=quest.trials,
                    observe=self._note,
                )
                if trials < quest.trials:
                    self._say(noise_of(study.get_trials(deepcopy=False)))

    def told(self) -> Told:
        """Return the widths ``(N, G)`` of all finished trials and their values ``(N,)``."""
        return told(self._study)

    def finish(self, beside: Sequence[Told] = ()) -> Searched:
        """Have the model recommend, and the finals decide; write all results.

        Args:
            beside: What other searches of the same network were told; the model learns from it too.

        Raises:
            UsageError: If no trial has a value.
        """
        if not len(self.told()[1]):
            raise UsageError(
                "no trial of this search has a value: all diverged; give a lower --lr, and another --out"
            )
        finalists = self._finalists(self._think(beside))
        for each in finalists:
            write_finalist(self._traced, each.name, each.widths, self._out)
        times = self._times(finalists)
        too_slow = {name for name, seen in times.items() if missed(seen, self._plan.targets)}
        outcome = finals(finalists, self._worth, self._trainer, self._quest, too_slow)
        self._say(outcome.verdict)
        conditions = {**facts_of_trials(self._study, self._quest, self._model.noise), **self._conditions}
        record = record_of(outcome, self._reference.arm(self._trainer), conditions, times)
        architecture, written = exported(self._traced, outcome, record, self._out)
        lacking = missing()
        if lacking is not None:
            self._say(lacking)
        plots = write_plots(self._out, self._study) if lacking is None else []
        annotate(self._study, self._out, plots)
        return Searched(architecture, outcome.model, record, {}, [*written, *plots], outcome)

    @cached_property
    def _model(self) -> AdditiveModel:
        believed = self._reference.curves if self._quest.informed else None
        kind = PairedModel if self._quest.interactions else AdditiveModel
        return kind(self._traced.cost, self._surface.allowed, self._plan.targets, believed)

    @cached_property
    def _baselines(self) -> Mapping[str, Solve]:
        plan, given = self._plan, (self._weights, self._trained)
        return {
            name: baseline(name, self._worth, self._surface, plan, *given)
            for name in self._quest.baseline_names
        }

    def _identity(self) -> dict[str, Any]:
        """Return what decides the values of the trials."""
        surface, ties = self._surface, self._plan.space.ties
        steps = {name: [int(w[0]), int(w[-1]), len(w)] for name, w in surface.allowed.items()}
        return {
            "model": self._traced.name,
            "data": self._trainer.data.fingerprint,
            "groups": steps,
            **({"ties": [list(tie) for tie in ties]} if ties else {}),
            **({"latency table": surface.table.key} if surface.table is not None else {}),
            **self._quest.identity(),
        }

    def _facts(self) -> dict[str, Any]:
        """Return what people are to know of the study; trains the reference."""
        names = self._traced.name, self._trainer.data.name
        facts = facts_of(self._quest, self._surface, *names, self._uniform, self._reference.accuracy)
        command = {"command": self._conditions["command"]} if "command" in self._conditions else {}
        return {**facts, **command}

    def _note(self, number: int) -> None:
        """Keep what people see of a trial, and now and then what the model thinks by now."""
        annotate_trial(self._study, self._out, number)
        if number and number % REFRESH == 0 and len(self.told()[1]):
            self._think()

    def _think(self, beside: Sequence[Told] = ()) -> Posterior:
        """Tell the model all values, and keep what it believes."""
        widths, values = zip(self.told(), *beside, strict=True)
        self._model.tell(np.concatenate(widths), np.concatenate(values))
        count = sum(map(len, values))
        posterior = Posterior.of(self._model, self._surface.allowed, self._uniform, count)
        posterior.write(self._out)
        return posterior

    def _finalists(self, believed: Posterior) -> list[Finalist]:
        """Return uniform widths, those of the baselines, the recommendation and the best trials."""
        self._say(f"noise of a trial: {believed.noise:.3g}, as the model estimates it")
        methods: dict[str, Solve] = {
            "uniform": self._uniform_at,
            **self._baselines,
            "search": lambda targets: self._model.at(targets).best(),
        }
        return [
            *(Finalist(name, self._settled(name, solve)) for name, solve in methods.items()),
            *best_trials(self._study, self._traced.cost, self._quest.best_trials),
        ]

    def _settled(self, name: str, solve: Solve) -> Mapping[str, int]:
        """Return widths that meet the targets, a latency as measured."""
        targets = self._plan.targets
        if self._clock is None:
            return solve(targets)
        self._say(f"{name}: widths for the finals")
        return settle(solve, self._traced.architecture, targets, self._clock, self._say)[0]

    def _uniform_at(self, targets: Sequence[Target]) -> Mapping[str, int]:
        return uniform_widths(self._traced.cost, self._surface.allowed, list(targets))

    def _times(self, finalists: Sequence[Finalist]) -> dict[str, Facts]:
        """Return what is known of the finalists' latencies, by name; nothing without a latency target."""
        if self._clock is None:
            return {}
        times: dict[str, Facts] = {}
        for each in finalists:
            seen = self._clock(self._traced.architecture(each.widths))
            times[each.name] = seen
            self._say(f"{each.name}: {verdict(seen, self._plan.targets)}")
            note(self._out / finalist_file(each.name), seen)
        return times
