"""What pictures and notes need to know of a search, as plain data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import numpy.typing as npt
import optuna
from optuna.trial import FrozenTrial, TrialState

from archsearch import files
from archsearch.errors import IntegrityError
from archsearch.results import Arm
from archsearch.search.facts import FACTS, told_by
from archsearch.search.objectives import OBJECTIVES
from archsearch.search.posterior import Posterior
from archsearch.search.reading import reading
from archsearch.search.sampler import WIDTHS
from archsearch.search.study import ORIGIN, UNIFORM, is_chosen, is_uniform

Floats = npt.NDArray[np.float64]

MOST = 30
"""So many groups have a utility curve or an importance that is shown."""

PARALLEL = 6
"""So many groups have an axis of their own in the parallel coordinates."""

ENOUGH = 10
"""So many trials say something about importances."""


@dataclass(frozen=True)
class Origin:
    """The trials of one enqueued architecture, a seed each.

    Attributes:
        name: Such as ``"uniform"`` or ``"l1_norm"``.
        trials: In order.
    """

    name: str
    trials: Sequence[FrozenTrial]

    @property
    def values(self) -> list[float]:
        """What they were worth."""
        return [float(trial.value) for trial in self.trials if trial.value is not None]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return fmean(self.values)

    @property
    def deviation(self) -> float:
        """Sample standard deviation over the seeds; 0 with one."""
        return stdev(self.values) if len(self.values) > 1 else 0.0


@dataclass(frozen=True)
class Overview:
    """A search as its pictures see it.

    Attributes:
        study: The study; importances are asked of it.
        facts: What is searched, for people.
        trials: The finished ones, in order, with widths and a value.
        posterior: What the model believes, where the search has got so far.
        arms: The finalists, where there are some.
    """

    study: optuna.Study
    facts: Mapping[str, Any]
    trials: Sequence[FrozenTrial]
    posterior: Posterior | None = None
    arms: Sequence[Arm] = field(default_factory=tuple)

    @classmethod
    def of(cls, study: optuna.Study, run: Path) -> Overview:
        """Look at a study and what else is in its run directory.

        Raises:
            IntegrityError: If the study does not say what it searches.
        """
        facts = told_by(study)
        if facts is None:
            raise IntegrityError(f"{run}: the study does not say what it searches ({FACTS}); search again")
        done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return cls(
            study,
            facts,
            [trial for trial in done if WIDTHS in trial.user_attrs and trial.value is not None],
            Posterior.read(run),
            _arms(run / "results.json"),
        )

    @classmethod
    def read(cls, run: Path) -> Overview:
        """Look at a run directory without writing there.

        Raises:
            UsageError: If it has no study.
            IntegrityError: If the study does not say what it searches.
        """
        with reading(run) as study:
            seen = cls.of(study, run)
            # A copy in memory outlives the file, and answers at once.
            memory = optuna.create_study(direction="maximize")
            memory.add_trials(study.get_trials(deepcopy=False))
        return cls(memory, seen.facts, seen.trials, seen.posterior, seen.arms)

    @property
    def title(self) -> str:
        """One line: network, data, targets."""
        facts = self.facts
        targets = facts.get("targets", "")
        said = targets if isinstance(targets, str) else ", ".join(map(str, targets))
        return " · ".join(str(part) for part in (facts.get("model"), facts.get("data"), said) if part)

    @property
    def unit(self) -> str:
        """What a trial's value is, for an axis."""
        return unit(self.facts)

    @cached_property
    def names(self) -> list[str]:
        """The groups, in the order of the widths."""
        return [str(name) for name, _ in self.facts["groups"]]

    @cached_property
    def sizes(self) -> Floats:
        """Their channels in the reference, ``(G,)``."""
        return np.array([size for _, size in self.facts["groups"]], dtype=np.float64)

    @cached_property
    def values(self) -> Floats:
        """The values of the trials, ``(N,)``."""
        return np.array([trial.value for trial in self.trials], dtype=np.float64)

    @cached_property
    def keeps(self) -> Floats:
        """The share of each group's channels that each trial keeps, in percent, ``(N, G)``."""
        widths = [json.loads(trial.user_attrs[WIDTHS]) for trial in self.trials]
        return 100 * np.array(widths, dtype=np.float64).reshape(-1, len(self.names)) / self.sizes

    @cached_property
    def searched(self) -> list[FrozenTrial]:
        """The trials whose point a sampler chose."""
        return [trial for trial in self.trials if is_chosen(trial)]

    @cached_property
    def starts(self) -> list[Origin]:
        """The enqueued architectures: uniform widths, and what each pruner says."""
        found: dict[str, list[FrozenTrial]] = {}
        for trial in self.trials:
            if not is_chosen(trial):
                name = UNIFORM if is_uniform(trial) else str(trial.user_attrs.get(ORIGIN, ""))
                found.setdefault(name, []).append(trial)
        return [Origin(name, trials) for name, trials in found.items()]

    @property
    def uniform(self) -> Origin | None:
        """The trials with uniform widths."""
        return next((start for start in self.starts if start.name == UNIFORM), None)

    @property
    def has_latency(self) -> bool:
        """Whether a latency is among the targets."""
        return bool(self.trials) and all("latency_ms" in trial.user_attrs for trial in self.trials)

    @property
    def recommended(self) -> Floats | None:
        """What the model's recommendation keeps of each group, in percent ``(G,)``."""
        if self.posterior is None:
            return None
        widths = [self.posterior.recommended[name] for name in self.names]
        return np.asarray(100 * np.array(widths) / self.sizes)

    @property
    def uniform_keeps(self) -> Floats | None:
        """What uniform widths keep of each group, in percent ``(G,)``."""
        if "uniform" not in self.facts:
            return None
        return np.asarray(100 * np.array(self.facts["uniform"]) / self.sizes)

    @property
    def gain_label(self) -> str:
        """What a utility curve shows, for an axis."""
        return f"gain over the least width, points of {self.unit.removesuffix(', %')}"

    @property
    def believed(self) -> list[str]:
        """The groups whose utility curves are shown, in their order: those worth most if there are many."""
        if self.posterior is None:
            return []
        curves = self.posterior.curves
        worth = sorted(curves, key=lambda name: -curves[name].mean[-1])[:MOST]
        return [name for name in self.names if name in worth]

    @property
    def cost_label(self) -> str:
        """What a network costs, for an axis."""
        return "predicted latency, ms" if self.has_latency else "MACs kept, %"

    def cost(self, trial: FrozenTrial) -> float:
        """Return what the network of a trial costs, in the unit of ``cost_label``."""
        facts = trial.user_attrs
        return float(facts["latency_ms"] if self.has_latency else 100 * facts["macs_kept"])

    @cached_property
    def importance(self) -> dict[str, float]:
        """How much of the values' spread each group's parameter explains, the largest shares first.

        PED-ANOVA (Watanabe et al., IJCAI 2023) as Optuna has it. Empty with fewer than ten trials, which say
        nothing about it.
        """
        if len(self.trials) < ENOUGH or not np.ptp(self.values) > 0:
            return {}
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        shares = optuna.importance.get_param_importances(self.study, evaluator=evaluator)
        return dict(list(shares.items())[:MOST])

    @property
    def important(self) -> list[int]:
        """The columns of the most important groups, in the order of the groups."""
        names = [name for name in self.importance if name in self.names][:PARALLEL]
        return sorted(self.names.index(name) for name in names)


def unit(facts: Mapping[str, Any]) -> str:
    """Return what a trial's value is, for an axis."""
    return OBJECTIVES[str(facts["objective"])].unit


def _arms(path: Path) -> list[Arm]:
    if not path.exists():
        return []
    found = files.read_json(path, IntegrityError)
    try:
        return [Arm(**{**arm, "accuracies": tuple(arm["accuracies"])}) for arm in found["arms"]]
    except (KeyError, TypeError) as error:
        raise IntegrityError(f"{path}: is not the record of a search: {error}") from error
