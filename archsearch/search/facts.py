"""What people are told of a search: the facts of its study, which the driver writes and all others read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import fmean, stdev
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from archsearch.search.quest import Quest
from archsearch.search.study import Surface, is_uniform

FACTS = "facts"
"""The user attribute of the study."""

CALIBRATION = "calibration"
"""That of how well objectives rank, and the directory of the tasks that found it out."""


def facts_of(
    quest: Quest, surface: Surface, model: str, data: str, uniform: Mapping[str, int], accuracy: float
) -> dict[str, Any]:
    """Return what people are to know of a search.

    Args:
        quest: How it goes about it.
        surface: What it may choose.
        model: Name of the reference.
        data: Name of the data set.
        uniform: Widths that are the same share everywhere.
        accuracy: Of the reference on validation images, in percent.
    """
    cost, table = surface.cost, surface.table
    return {
        "model": model,
        "data": data,
        "targets": [str(target) for target in quest.plan.targets],
        "groups": [[name, int(size)] for name, size in zip(cost.names, cost.sizes, strict=True)],
        "reference": {
            "macs": cost.reference.macs,
            "params": cost.reference.params,
            **({"latency_ms": table.reference_ms} if table is not None else {}),
            "validation accuracy": round(accuracy, 2),
        },
        "uniform": [uniform[name] for name in cost.names],
        "proxy": quest.proxy,
        "objective": quest.objective,
        "short": quest.short,
        "sampler": quest.sampler,
        "trials": quest.trials,
        "budget": quest.plan.budget,
        "epochs": quest.plan.recipe.epochs,
        "seed": quest.plan.seed,
    }


def told_by(study: optuna.Study) -> dict[str, Any] | None:
    """Return what a study tells; ``None`` where its search has not begun."""
    facts = study.user_attrs.get(FACTS)
    return facts if isinstance(facts, dict) and "groups" in facts else None


def facts_of_trials(study: optuna.Study, quest: Quest, noise: float) -> dict[str, Any]:
    """Return what a record says of a search and its trials.

    Args:
        study: With all trials.
        quest: How it went about it.
        noise: Standard deviation of a trial's value, as the model estimates it.
    """
    trials = study.get_trials(deepcopy=False)
    return {
        **quest.facts(),
        "noise": float(f"{noise:.4g}"),
        "seconds of trials": round(sum(trial.user_attrs.get("seconds", 0.0) for trial in trials)),
        **({CALIBRATION: study.user_attrs[CALIBRATION]} if quest.calibrate else {}),
    }


def noise_of(trials: Iterable[FrozenTrial]) -> str:
    """Return how much the trainings of uniform widths differ by their seeds alone."""
    values = [trial.value for trial in trials if is_uniform(trial) and trial.value is not None]
    if len(values) < 2:
        return "noise: not known, as fewer than two trainings of uniform widths have a value"
    return (
        f"noise: {len(values)} trainings of uniform widths, mean {fmean(values):.4g}, standard deviation "
        f"{stdev(values):.2g}"
    )
