"""Who chooses the next point: the model's own design, or a sampler of Optuna to compare with."""

from __future__ import annotations

import inspect
import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from archsearch.errors import UnknownNameError, UsageError
from archsearch.registry import Registry
from archsearch.search.model import AdditiveModel
from archsearch.search.project import REACH, logits
from archsearch.space import Widths

BETWEEN = 0.15
"""Share of a point's logits that are not at an end."""

MODEL = "model"
"""The name of the sampler that is not one of Optuna's."""

WIDTHS = "widths"
"""The user attribute of a trial that holds its widths, a list in the order of the groups."""


def distributions(names: Sequence[str]) -> dict[str, BaseDistribution]:
    """Return the parameters of a study: a logit for each group that has a choice."""
    return {name: FloatDistribution(-REACH, REACH) for name in names}


class ModelSampler(BaseSampler):
    """Points that say much about an additive model, whatever the values are.

    Trials that chase the best value so far cluster there, and a model that is fitted to them knows little of
    the curves. So the points fill the target surface. Most logits are at an end, where a rising curve shows
    most through the noise, and some between, for its shape. Every second point mirrors the one before (the
    foldover of experimental design), so that interactions of two groups do not pass for the effect of one.
    A point depends on the seed and the trial's number alone: a study that goes on draws what it would have
    drawn.

    Args:
        names: The groups that have a choice.
        seed: Of the points.
        model: Is told all finished trials before a Thompson draw.
        allowed: The widths that each group may have.
        thompson: Share of the trials that are the best widths of a draw from the posterior instead.
    """

    def __init__(
        self,
        names: Sequence[str],
        seed: int,
        model: AdditiveModel | None = None,
        allowed: Mapping[str, Widths] | None = None,
        thompson: float = 0.0,
    ) -> None:
        if not 0 <= thompson <= 1:
            raise UsageError(f"thompson {thompson:g}: a share is in [0, 1]")
        self._names, self._seed, self._model = list(names), seed, model
        self._allowed, self._thompson = allowed or {}, thompson

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the logits of all groups."""
        return distributions(self._names)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: Mapping[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the point of a trial."""
        if self._model is not None and self._draws(trial.number):
            widths, values = told(study)
            if len(values):
                self._model.tell(widths, values)
                seed = int(np.random.SeedSequence([self._seed, trial.number]).generate_state(1)[0])
                return logits(self._model.best(self._model.draw(seed)), self._allowed)
        return self.point(trial.number)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Return the logit of one group; Optuna asks where a trial was enqueued with some of them."""
        return self.point(trial.number)[param_name]

    def point(self, number: int) -> dict[str, float]:
        """Return the space-filling point of a number."""
        generator = np.random.default_rng([self._seed, number // 2])
        between = generator.uniform(-REACH, REACH, len(self._names))
        x = np.where(generator.random(len(between)) < BETWEEN, between, np.copysign(REACH, between))
        return dict(zip(self._names, (-x if number % 2 else x).tolist(), strict=True))

    def _draws(self, number: int) -> bool:
        return int((number + 1) * self._thompson) > int(number * self._thompson)


Told = tuple[Widths, np.ndarray[Any, np.dtype[np.float64]]]
"""Widths ``(N, G)`` of networks, and what they were worth, ``(N,)``."""


def told(study: optuna.Study) -> Told:
    """Return the widths ``(N, G)`` and the values ``(N,)`` of all finished trials."""
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    widths = [json.loads(trial.user_attrs[WIDTHS]) for trial in done]
    return np.array(widths, dtype=np.int64), np.array([trial.value for trial in done], dtype=np.float64)


Make = Callable[[int], BaseSampler]


class _Samplers(Registry[Make]):
    """The short names, and Optuna's classes by their own, with ``optuna:`` before them or without."""

    def __getitem__(self, name: str) -> Make:
        """Return what makes a sampler from a seed.

        Raises:
            UnknownNameError: If neither this nor Optuna knows the name.
            UsageError: If it names a class that cannot be used here; says why.
        """
        if name.startswith(_PREFIX) or (name not in self and name in optuna.samplers.__all__):
            return _of_optuna(name.removeprefix(_PREFIX))
        if name not in self:
            raise UnknownNameError(self.kind, name, [MODEL, *self], self._hint)
        return super().__getitem__(name)


_PREFIX = "optuna:"

SAMPLERS = _Samplers("sampler", hint="(or a class of optuna.samplers, such as QMCSampler)")
SAMPLERS.register("tpe")(lambda seed: optuna.samplers.TPESampler(seed=seed))
SAMPLERS.register("gp")(lambda seed: optuna.samplers.GPSampler(seed=seed))
SAMPLERS.register("nsga2")(lambda seed: optuna.samplers.NSGAIISampler(population_size=30, seed=seed))
SAMPLERS.register("random")(lambda seed: optuna.samplers.RandomSampler(seed=seed))


def _of_optuna(name: str) -> Make:
    """Return what makes the sampler of an Optuna class, which is tried on a study of its own first."""
    known = {
        each: found
        for each in optuna.samplers.__all__
        if isinstance(found := getattr(optuna.samplers, each), type) and issubclass(found, BaseSampler)
    }
    if name not in known:
        raise UnknownNameError("class of optuna.samplers", name, known)
    make, parameters = known[name], inspect.signature(known[name]).parameters
    needed = [each for each, value in parameters.items() if value.default is inspect.Parameter.empty]
    if hasattr(sys.modules[make.__module__], "pickle"):
        raise UsageError(
            f"--sampler {name}: unpickles what it finds in the study, which may be code of somebody else: "
            f"take one of {', '.join([MODEL, *SAMPLERS])}"
        )
    if needed:
        raise UsageError(f"--sampler {name}: needs arguments ({', '.join(needed)}), which a name cannot give")

    def made(seed: int) -> BaseSampler:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return make(**({"seed": seed} if "seed" in parameters else {}))

    try:
        optuna.create_study(sampler=made(0)).ask(distributions(["one", "other"]))
    except Exception as error:  # whatever a class does that is not made for points like these
        raise UsageError(f"--sampler {name}: cannot be used here: {error}") from error
    return made


def make_sampler(
    name: str,
    names: Sequence[str],
    seed: int,
    trials: int,
    model: AdditiveModel,
    allowed: Mapping[str, Widths],
    thompson: float = 0.0,
) -> BaseSampler:
    """Return a sampler for the rest of a study.

    Args:
        name: ``model``, a name in ``SAMPLERS``, or that of an Optuna class.
        names: The groups that have a choice.
        seed: Of the study.
        trials: That the study has; Optuna's samplers would repeat their first points otherwise.
        model: For Thompson draws.
        allowed: The widths that each group may have.
        thompson: Share of Thompson draws of the model's sampler.
    """
    if name == MODEL:
        return ModelSampler(names, seed, model, allowed, thompson)
    return SAMPLERS[name](int(np.random.SeedSequence([seed, trials]).generate_state(1)[0]))
