"""``archsearch search``: from a reference to an architecture that held its own against uniform widths."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import optuna

from archsearch.allocation import LeastError
from archsearch.errors import UsageError
from archsearch.on_device import Device, aimed
from archsearch.pipeline import Found, widths_by
from archsearch.pruning import uniform_widths
from archsearch.rebuild import Traced
from archsearch.results import Record
from archsearch.search.artifacts import annotate, annotate_trial
from archsearch.search.calibrate import HEADER, Calibration, carried_out
from archsearch.search.claims import Claims
from archsearch.search.crew import Crew
from archsearch.search.export import exported, timed, write_finalist
from archsearch.search.finals import Finalist, Outcome, best_trials, finals, seeds_of, threads_as
from archsearch.search.inherit import inherited
from archsearch.search.loop import run
from archsearch.search.model import AdditiveModel
from archsearch.search.objectives import OBJECTIVES
from archsearch.search.overview import FACTS
from archsearch.search.page import write_plots
from archsearch.search.pairs import PairedModel
from archsearch.search.pictures import missing
from archsearch.search.posterior import Posterior
from archsearch.search.project import project
from archsearch.search.quest import Quest
from archsearch.search.recommendation import Recommendation
from archsearch.search.reference import Reference
from archsearch.search.sampler import ModelSampler, make_sampler, told
from archsearch.search.storage import address
from archsearch.search.study import ORIGIN, Start, Surface, joined
from archsearch.search.timing import Stopwatch
from archsearch.search.trial import Scratch
from archsearch.search.work import Direct, Value, Work
from archsearch.trainer import Say, Trainer

__all__ = ["Quest", "Searched", "search"]

NOISE_SEEDS = 3
"""How often uniform widths are trained, so that the noise shows before anything is believed."""

CALIBRATION = "calibration"
"""Where its trainings' tasks are, and its user attribute of the study."""

REFRESH = 10
"""After so many trials people can see again what the model recommends."""


@dataclass(frozen=True)
class Searched(Found):
    """What a search gives; nothing of the found network is inherited, so that it has no selection.

    Attributes:
        outcome: The finalists and what was decided.
    """

    outcome: Outcome


def search(
    traced: Traced,
    quest: Quest,
    trainer: Trainer,
    *,
    out: Path,
    weights: str | None = None,
    trained: bool = False,
    device: Device | None = None,
    trust_code: bool = False,
    crew: Crew | None = None,
    storage: str | None = None,
    conditions: Mapping[str, Any] | None = None,
    say: Say = lambda line: None,
) -> Searched:
    """Search the widths that train best at a target; the same call goes on where it was killed.

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
        InfeasibleError: If no allowed widths meet the targets; before anything is trained.
        ArchsearchError: If the study in ``out`` is another one, or in use.
    """
    plan = quest.plan
    if device is not None:
        traced, space = aimed(traced, plan.space, device.table)
        plan = replace(plan, space=space)
    if plan.drops_branches(traced.graph.sizes):
        traced = traced.with_branches()
    quest = replace(quest, plan=plan)
    surface = Surface(
        traced.cost,
        plan.space.allowed(traced.graph),
        plan.targets,
        device.table if device is not None else None,
    )
    url = address(storage)
    # Another driver trains the same reference and finalists.
    trainer = replace(trainer, waits=url is not None)
    found = _Search(traced, quest, trainer, surface, crew or Crew(), out, weights, trained, say)
    with joined(out, found.identity(), url, say) as (study, claims):
        write_finalist(traced, "uniform", found.uniform, out)
        study.set_user_attr(FACTS, found.facts(conditions or {}))
        annotate(study, out)
        found.calibrate(study)
        found.trials(study, claims)
        finalists = found.finalists(study)
        outcome = found.finals(finalists)
        for each in finalists:
            write_finalist(traced, each.name, each.widths, out)
        record = found.record(study, outcome, conditions or {})
        architecture, written = exported(traced, outcome, record, out)
        if device is not None:
            times = Stopwatch(device, trust_code, say).times(traced, finalists, out)
            architecture, record = timed(times, outcome, record, list(plan.targets), out, say)
        plots = write_plots(out, study) if missing() is None else []
        annotate(study, out, plots)
        return Searched(architecture, outcome.model, record, {}, [*written, *plots], outcome)


class _Search:
    """One search: what is known before its first trial, and what is done with the study."""

    def __init__(
        self,
        traced: Traced,
        quest: Quest,
        trainer: Trainer,
        surface: Surface,
        crew: Crew,
        out: Path,
        weights: str | None,
        trained: bool,
        say: Say,
    ) -> None:
        plan = quest.plan
        self._traced, self._quest, self._surface, self._say = traced, quest, surface, say
        self._trainer, self._blind = trainer, trainer.blinded()
        self._crew, self._out = crew, out
        self._weights, self._trained = weights, trained
        # An impossible target shows here, before anything is trained.
        self.uniform = uniform_widths(traced.cost, surface.allowed, list(plan.targets))
        self._scratch = Scratch(traced, plan.recipe, plan.budget, published_cost=plan.published_cost)
        self._reference = Reference(traced, plan, self._blind, weights, trained=trained)
        self._baselines: list[Finalist] = []
        self._model: AdditiveModel | None = None

    def identity(self) -> dict[str, Any]:
        """Return what decides the values of the trials."""
        surface, ties = self._surface, self._quest.plan.space.ties
        steps = {name: [int(w[0]), int(w[-1]), len(w)] for name, w in surface.allowed.items()}
        return {
            "model": self._traced.name,
            "data": self._trainer.data.fingerprint,
            "groups": steps,
            **({"ties": [list(tie) for tie in ties]} if ties else {}),
            **({"latency table": surface.table.key} if surface.table is not None else {}),
            **self._quest.identity(),
        }

    def facts(self, conditions: Mapping[str, Any]) -> dict[str, Any]:
        """Return what people are to know of the study; trains the reference, and what baselines need."""
        quest, cost = self._quest, self._traced.cost
        reference = {"macs": cost.reference.macs, "params": cost.reference.params}
        table = self._surface.table
        self._baselines = [Finalist(name, self._widths_of(name)) for name in quest.baseline_names]
        return {
            "model": self._traced.name,
            "data": self._trainer.data.name,
            "targets": [str(target) for target in quest.plan.targets],
            "groups": [[name, int(size)] for name, size in zip(cost.names, cost.sizes, strict=True)],
            "reference": {
                **reference,
                **({"latency_ms": table.reference_ms} if table is not None else {}),
                "validation accuracy": round(self._reference.accuracy, 2),
            },
            "uniform": [self.uniform[name] for name in cost.names],
            **({"command": conditions["command"]} if "command" in conditions else {}),
            "proxy": quest.proxy,
            "objective": quest.objective,
            "short": quest.short,
            "sampler": quest.sampler,
            "trials": quest.trials,
            "budget": quest.plan.budget,
            "epochs": quest.plan.recipe.epochs,
            "seed": quest.plan.seed,
        }

    def calibrate(self, study: optuna.Study) -> None:
        """Measure how well objectives rank, if that is asked for; keep it in the study."""
        quest, surface = self._quest, self._surface
        if not quest.calibrate:
            return
        points = ModelSampler(surface.names, quest.plan.seed)
        widths = [
            project(points.point(number), surface.cost, surface.allowed, surface.targets)
            for number in range(quest.calibrate)
        ]
        short, first, second = (
            self._trained_all(widths, share, quest.plan.seed + more)
            for share, more in ((quest.short, 0), (1.0, 0), (1.0, 1))
        )
        objectives = {
            "proxy": [self._error(each, 0) for each in widths],
            "inherit": [self._inherited(each, 0) for each in widths],
            "short": short,
        }
        found = Calibration.of(objectives, [first, second], quest.plan.seed)
        study.set_user_attr(CALIBRATION, found.facts())
        self._say(f"rank correlation with full training, {found.networks} networks of the target")
        for row in [HEADER, *found.rows()]:
            self._say("{:<10} {:>8}  {:<16} {:>8}  {}".format(*row))
        self._say(f"an objective without any error would reach {found.ceiling:.2f} (Spearman)")

    def trials(self, study: optuna.Study, claims: Claims) -> None:
        """Evaluate the trials: uniform widths first, which show the noise."""
        quest, surface, seed = self._quest, self._surface, self._quest.plan.seed
        believed = self._reference.curves if quest.informed else None
        kind = PairedModel if quest.interactions else AdditiveModel
        self._model = kind(self._traced.cost, surface.allowed, quest.plan.targets, believed)
        starts = [Start("uniform", self.uniform, seed)]
        noisy = OBJECTIVES[quest.objective].trains
        if noisy:
            starts += [Start("uniform, again", self.uniform, seed + more) for more in range(1, NOISE_SEEDS)]
        starts += [Start(each.name, each.widths, seed) for each in self._baselines]
        sampler = make_sampler(
            quest.sampler,
            surface.names,
            seed,
            len(study.trials) + claims.salt,
            self._model,
            surface.allowed,
            quest.thompson,
        )

        def go(work: Work, trials: int) -> None:
            run(
                study,
                surface,
                sampler,
                work,
                trials,
                starts,
                seed,
                self._say,
                rungs=quest.rungs,
                claims=claims,
                total=quest.trials,
                observe=lambda number: self._note(study, number),
            )

        with contextlib.closing(self._work()) as work:
            if noisy and quest.trials > NOISE_SEEDS:
                go(work, NOISE_SEEDS)
                self._say(noise_of(study))
            go(work, quest.trials)

    def _note(self, study: optuna.Study, number: int) -> None:
        """Keep what people see of a trial, and now and then what the model thinks by now."""
        annotate_trial(study, self._out, number)
        if number and number % REFRESH == 0:
            self._think(study)

    def _think(self, study: optuna.Study) -> None:
        """Tell the model all values, and keep what it recommends."""
        widths, values = told(study)
        if not len(values):
            return
        self._known.tell(widths, values)
        Recommendation.of(self._known, self.uniform, len(values)).write(self._out)
        Posterior.of(self._known, self._surface.allowed, values.tolist()).write(self._out)

    def finalists(self, study: optuna.Study) -> list[Finalist]:
        """Return uniform widths, those of the baselines, the recommendation and the best trials."""
        if not len(told(study)[1]):
            raise UsageError("no trial of this search has a value: all diverged; give a lower --lr")
        self._think(study)
        self._say(f"noise of a trial: {self._known.noise:.3g}, as the model estimates it")
        return [
            Finalist("uniform", self.uniform),
            *self._baselines,
            Finalist("search", self._known.best()),
            *best_trials(study, self._traced.cost, self._quest.best_trials),
        ]

    def finals(self, finalists: Sequence[Finalist]) -> Outcome:
        """Train the finalists again with fresh seeds, and decide."""
        quest, crew = self._quest, self._crew
        threads = None
        if crew.name != "inline":
            # Workers train them side by side; below they are found in the store.
            networks = [
                (each.widths, seed) for each in finalists for seed in seeds_of(quest.finals, quest.plan.seed)
            ]
            work = crew.tasks(self._out / "finals", self._scratch, self._blind, "finals", self._say)
            with contextlib.closing(work):
                carried_out(work, networks)
                threads = work.threads
        with threads_as(threads):
            outcome = finals(
                finalists, self._scratch, self._blind, self._trainer, quest.finals, quest.plan.seed
            )
        self._say(outcome.verdict)
        return outcome

    def record(self, study: optuna.Study, outcome: Outcome, conditions: Mapping[str, Any]) -> Record:
        """Return conditions and arms."""
        facts = {
            **self._quest.facts(),
            "noise": float(f"{self._known.noise:.4g}"),
            "seconds of trials": round(
                sum(trial.user_attrs.get("seconds", 0.0) for trial in study.get_trials(deepcopy=False))
            ),
            **({CALIBRATION: study.user_attrs[CALIBRATION]} if self._quest.calibrate else {}),
            "verdict": outcome.verdict,
            "validation": {
                name: [round(accuracy, 2) for accuracy in accuracies]
                for name, accuracies in outcome.validation.items()
            },
            **conditions,
        }
        return Record(facts, [self._reference.arm(self._trainer), *outcome.arms])

    @property
    def _known(self) -> AdditiveModel:
        if self._model is None:
            raise RuntimeError("trials come before finals")
        return self._model

    def _widths_of(self, baseline: str) -> Mapping[str, int]:
        """Return what a method finds at the targets."""
        plan = self._quest.plan
        if baseline == self._quest.allocated:
            return LeastError().widths(
                self._traced.cost, self._reference.curves, self._surface.allowed, plan.targets
            )
        method, _, allocation = baseline.partition(":")
        options = plan.options if method == plan.method else {}
        asked = replace(plan, method=method, allocation=allocation or None, options=options)
        return widths_by(
            self._traced, asked, self._blind, weights=self._weights, trained=self._trained, say=self._say
        )

    def _work(self) -> Work:
        """Return who finds out what widths are worth."""
        quest = self._quest
        direct: Mapping[str, Value] = {"proxy": self._error, "inherit": self._inherited}
        if quest.objective in direct:
            return Direct(direct[quest.objective])
        scratch = self._scratch.shortened(quest.short if quest.objective == "short" else 1.0)
        return self._crew.tasks(self._out, scratch, self._blind, quest.objective, self._say)

    def _trained_all(self, widths: Sequence[Mapping[str, int]], share: float, seed: int) -> list[float]:
        """Return the validation accuracies of networks that are trained for a share of the epochs."""
        place = self._out / CALIBRATION / f"{round(100 * share)}-{seed}"
        scratch = self._scratch.shortened(share)
        work = self._crew.tasks(place, scratch, self._blind, CALIBRATION, self._say)
        with contextlib.closing(work):
            return carried_out(work, [(each, seed) for each in widths])

    def _error(self, widths: Mapping[str, int], seed: int) -> float:
        return -float(sum(self._reference.curves[name][width] for name, width in widths.items()))

    def _inherited(self, widths: Mapping[str, int], seed: int) -> float:
        return inherited(self._traced, self._reference, self._reference.selection(widths), self._blind)


def noise_of(study: optuna.Study) -> str:
    """Return how much the trainings of uniform widths differ by their seeds alone, for people."""
    values = [
        trial.value
        for trial in study.get_trials(deepcopy=False)
        if str(trial.user_attrs.get(ORIGIN, "")).startswith("uniform") and trial.value is not None
    ]
    if len(values) < 2:
        return "noise: not known, as fewer than two trainings of uniform widths have a value"
    return (
        f"noise: {len(values)} trainings of uniform widths give {fmean(values):.2f} with a standard "
        f"deviation of {stdev(values):.2f}"
    )
