"""Which sampler finds widths on a problem whose optimum is known, with and without training noise.

The 27 inner groups of ResNet-56 with its exact MACs. Each group g contributes ``weight * keep ** power``,
weights lognormal(0, 0.8), powers uniform in [0.15, 0.7]; MACs are linear in these widths, so the knapsack
knows the optimum. A score is 0 at the optimum and 100 at uniform widths. Noise is a share of what can be won
(optimum less uniform). The proxy is the truth with each group's weight off by a lognormal factor.

Optuna's samplers walk on the same projected points, start from uniform widths, and answer with their best
trial; ``model`` answers with the knapsack of its posterior mean, refitted to all trials.

    python scripts/bench_search.py --seeds 4 --trials 30,100,300
"""

from __future__ import annotations

import argparse
import json
import resource
from collections.abc import Callable, Iterator

import numpy as np
import optuna

from archsearch.allocation import Curves, LeastError
from archsearch.models import resolve
from archsearch.rebuild import trace_source
from archsearch.search.model import AdditiveModel
from archsearch.search.project import logits, project
from archsearch.search.sampler import WIDTHS, ModelSampler, make_sampler
from archsearch.search.study import Surface
from archsearch.space import SearchSpace
from archsearch.targets import Target

PROXY_ERROR = 0.5
MODELS = {"model": False, "model+proxy": True, "thompson+proxy": True}


class Problem:
    """One instance: true error curves, a proxy of them, the optimum."""

    def __init__(self, surface: Surface, seed: int, noise: float) -> None:
        generator = np.random.default_rng(seed)
        names = surface.names
        weights = generator.lognormal(0, 0.8, len(names))
        powers = generator.uniform(0.15, 0.7, len(names))
        wrong = generator.lognormal(0, PROXY_ERROR, len(names))
        sizes = surface.cost.mapping(surface.cost.sizes)
        self.truth: dict[str, np.ndarray] = {name: np.zeros(size + 1) for name, size in sizes.items()}
        self.proxy: dict[str, np.ndarray] = dict(self.truth)
        for name, weight, power, factor in zip(names, weights, powers, wrong, strict=True):
            share = np.arange(sizes[name] + 1) / sizes[name]
            self.truth[name] = weight * (1 - share**power)
            self.proxy[name] = factor * self.truth[name]
        self.surface, self._generator = surface, generator
        self.uniform = project({}, surface.cost, surface.allowed, surface.targets)
        self._best = self.value(self.knapsack(self.truth))
        self._gap = self._best - self.value(self.uniform)
        self._noise = noise * self._gap

    def knapsack(self, errors: Curves) -> dict[str, int]:
        s = self.surface
        return LeastError().widths(s.cost, errors, s.allowed, s.targets)

    def value(self, widths: dict[str, int]) -> float:
        return -float(sum(self.truth[name][width] for name, width in widths.items()))

    def trained(self, widths: dict[str, int]) -> float:
        return self.value(widths) + self._noise * float(self._generator.normal())

    def score(self, widths: dict[str, int]) -> float:
        return 100 * (self._best - self.value(widths)) / self._gap


def surfaces(targets: list[str]) -> Iterator[tuple[str, Surface]]:
    traced = trace_source(resolve("resnet56"), {}, (3, 32, 32))
    allowed = SearchSpace(ignore=("conv1",)).allowed(traced.graph)
    for text in targets:
        yield text, Surface(traced.cost, allowed, [Target.parse("flops", text)])


def searched(problem: Problem, name: str, seed: int, checkpoints: list[int]) -> tuple[list[float], float]:
    """Return the score at each number of trials, and the milliseconds of CPU that a trial takes."""
    surface = problem.surface
    model = AdditiveModel(
        surface.cost, surface.allowed, surface.targets, problem.proxy if MODELS.get(name) else None
    )
    if name in MODELS:
        share = 0.3 if name.startswith("thompson") else 0.0
        sampler: optuna.samplers.BaseSampler = ModelSampler(
            surface.names, seed, model, surface.allowed, share
        )
    else:
        sampler = make_sampler(name, surface.names, seed, 0, model, surface.allowed)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.enqueue_trial(logits(problem.uniform, surface.allowed))
    rows, values, scores = [], [], []
    cpu_s = 0.0
    for number in range(1, max(checkpoints) + 1):
        start = cpu_time_s()
        trial = study.ask()
        widths = surface.suggest(trial)
        cpu_s += cpu_time_s() - start
        rows.append(surface.cost.array(widths))
        values.append(problem.trained(widths))
        trial.set_user_attr(WIDTHS, json.dumps(rows[-1].tolist()))
        study.tell(trial, values[-1])
        if number in checkpoints:
            if name in MODELS:
                model.tell(np.array(rows), values)
                answer = model.best()
            else:
                answer = surface.cost.mapping(rows[int(np.argmax(values))])
            scores.append(problem.score(answer))
    return scores, 1e3 * cpu_s / max(checkpoints)


def cpu_time_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def cells(results: list[list[float]], how: Callable[..., np.ndarray]) -> str:
    return " / ".join(f"{value:.3g}" if abs(value) < 1 else f"{value:.0f}" for value in how(results, axis=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samplers", default="random,tpe,nsga2,model,model+proxy")
    parser.add_argument("--trials", default="30,100,300")
    parser.add_argument("--targets", default="0.5,0.3")
    parser.add_argument("--noise", default="0,0.5")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--first-seed", type=int, default=0)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    checkpoints = [int(text) for text in options.trials.split(",")]
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    print(
        f"score after {' / '.join(map(str, checkpoints))} trials; 0 optimum, 100 uniform; {len(seeds)} seeds"
    )
    print("| MACs | noise | sampler | mean | worst seed | CPU ms a trial |")
    print("| --- | --- | --- | --- | --- | --- |")
    for text, surface in surfaces(options.targets.split(",")):
        for noise in map(float, options.noise.split(",")):
            alone = [[p.score(p.knapsack(p.proxy))] for p in (Problem(surface, s, noise) for s in seeds)]
            print(
                f"| {text} | {noise:g} | proxy alone | {cells(alone, np.mean)} | {cells(alone, np.max)} | |"
            )
            for name in options.samplers.split(","):
                runs = [searched(Problem(surface, seed, noise), name, seed, checkpoints) for seed in seeds]
                results = [scores for scores, _ in runs]
                cost = np.mean([ms for _, ms in runs])
                print(
                    f"| {text} | {noise:g} | {name} | {cells(results, np.mean)} | "
                    f"{cells(results, np.max)} | {cost:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
