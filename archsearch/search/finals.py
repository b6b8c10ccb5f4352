"""The finals: what a search recommends against uniform widths, trained again with seeds it never saw.

The best of many noisy trials is mostly the luckiest one. So the values of trials are not results: the
finalists are trained from scratch with fresh seeds, the winner is chosen on validation images, and every
finalist is measured once on the test set. Where the winner cannot be told from uniform widths, uniform widths
are what is exported.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import optuna
from torch import nn

from archsearch.cost import CostModel
from archsearch.errors import DivergedError
from archsearch.results import Arm, gain
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
        arms: Of all finalists, with test accuracies.
        validation: What decided: the validation accuracies in percent by finalist.
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


def _side_by_side(finalists: Sequence[Finalist], worth: Worth, fresh: Sequence[int]) -> Train:
    """Have workers train the finalists, on whatever device; return what reads the trained networks."""
    networks = [(each.widths, seed) for each in finalists for seed in fresh]
    places = {}
    for (widths, seed), found in zip(networks, worth.trained(networks, FINALS), strict=True):
        if found.value is None:
            raise DivergedError(f"a finalist, seed {seed}: {found.reason[1] if found.reason else 'no value'}")
        places[tuple(widths.items()), seed] = Path(found.facts["training"])

    def read(trainer: Trainer, label: str, widths: Mapping[str, int], seed: int) -> Trained:
        model = fresh_network(worth.traced, widths, seed)
        recipe = worth.scratch.recipe_of(widths)
        return trainer.kept(label, model, recipe, places[tuple(widths.items()), seed])

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
    validation = {
        each.name: [train(blind, each.name, each.widths, s).accuracy for s in fresh] for each in finalists
    }
    # On validation alone: what the test set says can no longer change the choice.
    unmeasured = {
        name: Arm(name, name, scratch.budget, 0, 0, accuracies=tuple(accuracies))
        for name, accuracies in validation.items()
    }
    running = [each for each in finalists if each.name not in too_slow] or finalists
    uniform = finalists[0]
    # Among equals the first, so that uniform widths stay where nothing is better.
    chosen = max(running, key=lambda each: unmeasured[each.name].mean or 0.0)
    gained = gain(unmeasured[chosen.name], unmeasured[uniform.name])
    better = gained is not None and gained[0] > gained[1]
    exported = chosen if better or uniform not in running else uniform
    arms, models = [], {}
    for each in finalists:
        trained = [train(trainer, f"{each.name}, seed {s}", each.widths, s) for s in fresh]
        name = f"{each.name}, {scratch.budget}"
        arms.append(arm_of(name, each.name, scratch.budget, scratch.traced.cost.of(each.widths), trained))
        models[each.name] = trained[0].model
    if gained is None:
        said = "uniform widths have the highest validation accuracy: they are exported"
    else:
        said = f"{chosen.name} gains {gained[0]:+.2f} ± {gained[1]:.2f} points over uniform on validation"
        said += ": exported" if better else ": not distinguishable from uniform"
        if not better:
            said += ", which is exported" if exported is uniform else ", which is too slow"
    return Outcome(arms, validation, chosen, exported, models[exported.name], said)
