"""What a model of one target gains from the trials of other targets, on the problem of ``bench_search.py``.

Each target has the same number of trials, which start with three trainings of uniform widths. ``alone`` is
told those of its target, ``together`` those of all, and ``centred`` those of all less the mean of each
target, in values and curves: as many offsets as targets. The noise is a share of what can be won at the
middle target.

    python scripts/bench_front.py --seeds 4 --trials 30,100
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from bench_search import Problem, cells, surfaces

from archsearch.search.model import AdditiveModel
from archsearch.search.project import project
from archsearch.search.sampler import ModelSampler
from archsearch.search.study import Surface

Told = tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]
KINDS = ("alone", "together", "centred")


class Centred(AdditiveModel):
    """The model with an offset for each of several targets, which have as many trials each."""

    targets = 1

    def features(self, widths: npt.ArrayLike) -> npt.NDArray[np.float64]:
        rows = super().features(widths)
        each = rows[:, 1:].reshape(self.targets, -1, rows.shape[1] - 1)
        rows[:, 1:] = (each - each.mean(1, keepdims=True)).reshape(len(rows), -1)
        return rows


def trials(surface: Surface, problem: Problem, count: int, deviation: float, seed: int) -> Told:
    sampler, generator = ModelSampler(surface.names, 0), np.random.default_rng([seed, 7])
    widths = [problem.uniform] * 3
    widths += [
        project(sampler.point(number), surface.cost, surface.allowed, surface.targets)
        for number in range(3, count)
    ]
    values = np.array([problem.value(each) for each in widths])
    return np.stack([surface.cost.array(each) for each in widths]), values + deviation * generator.normal(
        size=count
    )


def scores(
    surfaces: Sequence[Surface], seed: int, count: int, noise: float, coupling: float
) -> list[dict[str, float]]:
    problems = [Problem(surface, seed, 0.0, coupling) for surface in surfaces]
    # The same noise at all targets, as in trainings.
    middle = problems[len(problems) // 2]
    deviation = noise * middle._gap
    told = [
        trials(surface, problem, count, deviation, 100 * seed + number)
        for number, (surface, problem) in enumerate(zip(surfaces, problems, strict=True))
    ]
    widths = np.concatenate([each for each, _ in told])
    values = np.concatenate([each for _, each in told])
    centred = np.concatenate([each - each.mean() for _, each in told])
    found = []
    for surface, problem, own in zip(surfaces, problems, told, strict=True):
        space = surface.cost, surface.allowed, surface.targets
        models = {
            "alone": AdditiveModel(*space),
            "together": AdditiveModel(*space),
            "centred": Centred(*space),
        }
        models["centred"].targets = len(surfaces)
        models["alone"].tell(*own)
        models["together"].tell(widths, values)
        models["centred"].tell(widths, centred)
        found.append({kind: problem.score(model.best()) for kind, model in models.items()})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default="0.3,0.5,0.7")
    parser.add_argument("--trials", default="30,100")
    parser.add_argument("--noise", type=float, default=0.5)
    parser.add_argument("--coupling", type=float, default=0.0)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--first-seed", type=int, default=100)
    options = parser.parse_args()
    at = dict(surfaces(options.targets.split(",")))
    counts = [int(text) for text in options.trials.split(",")]
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    found = [
        [scores(list(at.values()), seed, count, options.noise, options.coupling) for count in counts]
        for seed in seeds
    ]
    print("| MACs | the model is told | mean | worst instance |")
    print("| --- | --- | --- | --- |")
    for number, text in enumerate(at):
        for kind in KINDS:
            results = [[of_count[number][kind] for of_count in instance] for instance in found]
            print(f"| {text} | {kind} | {cells(results, np.mean)} | {cells(results, np.max)} |")


if __name__ == "__main__":
    main()
