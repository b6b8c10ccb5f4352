"""The finals: what a search recommends against uniform widths, trained again with seeds it never saw.

The best of many noisy trials is mostly the luckiest one. So the values of trials are not results: the
finalists are trained from scratch with fresh seeds, the winner is chosen on validation images, and every
finalist is measured once on the test set. Where the winner cannot be told from uniform widths, uniform widths
are what is exported.

The best of several finalists is somewhat lucky too, so its gain over uniform widths has the interval for
comparing several with one (Dunnett, 1955), whose noise is estimated from all of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import optuna
from torch import nn

from archsearch.cost import CostModel
from archsearch.errors import DivergedError
from archsearch.results import Arm
from archsearch.search.quest import Quest
from archsearch.search.sampler import told
from archsearch.search.trial import Scratch
from archsearch.search.trial import fresh as fresh_network
from archsearch.search.worth import Worth
from archsearch.trainer import Trained, Trainer, arm_of

FINALS = "finals"
"""Where the tasks of workers are."""

Train = Callable[[Trainer, str, Mapping[str, int], int], Trained]
"""Returns the trained network of widths and a seed, as ``Scratch`` does."""

FRESH = 10_000
"""The first seed of the finals, after that of the search."""


@dataclass(frozen=True)
class Finalist:
    """Widths in the finals, and whose they are."""

    name: str
    widths: Mapping[str, int]


@dataclass(frozen=True)
class Outcome:
    """What the finals say.

    Attributes:
        arms: Of all finalists, with test accuracies; one that diverged has none.
        validation: What decided: the validation accuracies in percent by finalist that did not diverge.
        chosen: The finalist with the highest mean of these.
        exported: The same, or uniform widths where it is not distinguishable from them.
        model: The exported network, trained with the first fresh seed.
        verdict: One line for people.
    """

    arms: Sequence[Arm]
    validation: Mapping[str, Sequence[float]]
    chosen: Finalist
    exported: Finalist
    model: nn.Module
    verdict: str


def best_trials(study: optuna.Study, cost: CostModel, count: int) -> list[Finalist]:
    """Return the widths with the highest values, of several seeds their mean, the best first."""
    widths, values = told(study)
    of_widths: dict[tuple[int, ...], list[float]] = {}
    for row, value in zip(widths.tolist(), values.tolist(), strict=True):
        of_widths.setdefault(tuple(row), []).append(value)
    best = sorted(of_widths, key=lambda row: -fmean(of_widths[row]))[:count]
    return [
        Finalist("best trial" if rank == 1 else f"best trial {rank}", cost.mapping(row))
        for rank, row in enumerate(best, start=1)
    ]


def seeds_of(seeds: int, seed: int) -> range:
    """Return the fresh seeds of the finals of a search."""
    return range(seed + FRESH, seed + FRESH + seeds)


def finals(
    finalists: Sequence[Finalist],
    worth: Worth,
    trainer: Trainer,
    quest: Quest,
    too_slow: Collection[str] = (),
) -> Outcome:
    """Train the finalists with fresh seeds, choose on validation, then measure all of them on the test set.

    Args:
        finalists: The first has uniform widths.
        worth: Trains them.
        trainer: One that measures on the test set.
        quest: Says how many seeds.
        too_slow: Names of finalists that miss a latency target as measured: they are compared, and only
            exported where all do.
    """
    fresh = seeds_of(quest.finals, quest.plan.seed)
    train = worth.scratch if worth.crew.name == "inline" else _side_by_side(finalists, worth, fresh)
    return _decided(finalists, worth.scratch, train, worth.blind, trainer, fresh, too_slow)


def gain_of_best(
    rivals: Mapping[str, Sequence[float]], control: Sequence[float]
) -> tuple[float, float] | None:
    """Return by how much the best rival's mean is above the control's, and half of the 95 % interval.

    The interval holds for all rivals at once (Dunnett, 1955, *A multiple comparison procedure for comparing
    several treatments with a control*). ``None`` where nothing tells how large the noise is: with one seed,
    or if no rival's accuracies vary, nor the control's.

    Args:
        rivals: Accuracies in percent by name, of each one or more seeds.
        control: Those of what they are compared with.
    """
    arms = [*rivals.values(), control]
    if min(map(len, arms)) < 2 or not any(max(arm) > min(arm) for arm in arms):
        return None
    from scipy.stats import dunnett  # slow to import

    best = max(range(len(rivals)), key=lambda number: fmean(arms[number]))
    with warnings.catch_warnings():
        # A rival whose accuracies do not vary is no matter, and neither is an interval of 94.7 %.
        warnings.simplefilter("ignore")
        found = dunnett(*arms[:-1], control=control, random_state=np.random.default_rng(0))
        lowest = np.asarray(found.confidence_interval(0.95).low)[best]
    difference = fmean(arms[best]) - fmean(control)
    return difference, difference - float(lowest)


def _side_by_side(finalists: Sequence[Finalist], worth: Worth, fresh: Sequence[int]) -> Train:
    """Have workers train the finalists, on whatever device; return what reads the trained networks."""
    networks = [(each.widths, seed) for each in finalists for seed in fresh]
    found = dict(
        zip(
            ((tuple(widths.items()), seed) for widths, seed in networks),
            worth.trained(networks, FINALS),
            strict=True,
        )
    )

    def read(trainer: Trainer, label: str, widths: Mapping[str, int], seed: int) -> Trained:
        finding = found[tuple(widths.items()), seed]
        if finding.value is None:
            raise DivergedError(f"seed {seed}: {finding.reason[1] if finding.reason else 'no value'}")
        model = fresh_network(worth.traced, widths, seed)
        return trainer.kept(label, model, worth.scratch.recipe_of(widths), Path(finding.facts["training"]))

    return read


def _decided(
    finalists: Sequence[Finalist],
    scratch: Scratch,
    train: Train,
    blind: Trainer,
    trainer: Trainer,
    fresh: Sequence[int],
    too_slow: Collection[str],
) -> Outcome:
    uniform = finalists[0]
    validation: dict[str, list[float]] = {}
    for each in finalists:
        try:
            validation[each.name] = [train(blind, each.name, each.widths, s).accuracy for s in fresh]
        except DivergedError as error:
            if each is uniform:
                raise DivergedError(
                    f"uniform widths, which all are compared with: {error}: give a lower --lr, and another "
                    "--out"
                ) from error
    # On validation alone: what the test set says can no longer change the choice.
    sound = [each for each in finalists if each.name in validation]
    running = [each for each in sound if each.name not in too_slow] or sound
    # Among equals the first, so that uniform widths stay where nothing is better.
    chosen = max(running, key=lambda each: fmean(validation[each.name]))
    rivals = {each.name: validation[each.name] for each in running if each is not uniform}
    gained = gain_of_best(rivals, validation[uniform.name]) if chosen is not uniform else None
    better = gained is not None and gained[0] > gained[1]
    exported = chosen if better or uniform not in running else uniform
    arms, models = [], {}
    for each in finalists:
        name, cost = f"{each.name}, {scratch.budget}", scratch.traced.cost.of(each.widths)
        if each not in sound:
            arms.append(Arm(f"{name}, diverged", each.name, scratch.budget, cost.macs, cost.params))
            continue
        trained = [train(trainer, f"{each.name}, seed {s}", each.widths, s) for s in fresh]
        arms.append(arm_of(name, each.name, scratch.budget, cost, trained))
        models[each.name] = trained[0].model
    if chosen is uniform:
        said = "uniform widths have the highest validation accuracy: they are exported"
    else:
        said = f"{chosen.name} has the highest validation accuracy, with seeds that say nothing of the noise"
        if gained is not None:
            said = f"{chosen.name} gains {gained[0]:+.2f} ± {gained[1]:.2f} points over uniform on validation"
        said += ": exported" if better else ": not distinguishable from uniform"
        if not better:
            said += ", which is exported" if exported is uniform else ", which is too slow"
    return Outcome(arms, validation, chosen, exported, models[exported.name], said)
