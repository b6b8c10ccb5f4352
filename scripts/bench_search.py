"""Which sampler finds widths on a problem whose optimum is known, with and without training noise.

The 27 inner groups of ResNet-56 with its exact MACs. Each group g contributes ``weight * keep ** power``,
weights lognormal(0, 0.8), powers uniform in [0.15, 0.7]; MACs are linear in these widths, so the knapsack
knows the optimum. A score is 0 at the optimum and 100 at uniform widths. Noise is a share of what can be won
(optimum less uniform). The proxy is the truth with each group's weight off by a lognormal factor.

With ``--coupling C`` adjacent blocks also lose ``C * factor * sqrt(weight * weight') * (keep - keep')**2``,
factors lognormal(0, 0.5): no sum of curves tells that. The optimum is then that of real keep shares, by SLSQP
(the problem is concave), which whole widths come close to.

Optuna's samplers walk on the same projected points, start from uniform widths, and answer with their best
trial. Those named ``raw-`` walk on the keep shares as they are, the MACs being a constraint, and answer with
the best trial that meets it. ``model`` answers with the knapsack of its posterior mean, refitted to all
trials; ``pairs`` is the model with products of neighbours. ``cmaes`` needs the package cmaes.

    python scripts/bench_search.py --seeds 4 --trials 30,100,300
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import warnings
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import optuna
from optuna.samplers import BaseSampler
from optuna.trial import Trial
from scipy.optimize import minimize

from archsearch.allocation import Curves, LeastError, counter
from archsearch.models import resolve
from archsearch.rebuild import trace_source
from archsearch.search.model import AdditiveModel
from archsearch.search.pairs import PairedModel
from archsearch.search.project import logits, project
from archsearch.search.sampler import MODEL, SAMPLERS, WIDTHS, make_sampler
from archsearch.search.study import Surface
from archsearch.space import SearchSpace
from archsearch.targets import Target

PROXY_ERROR = 0.5
MODELS = ("model", "model+proxy", "thompson+proxy", "pairs", "pairs+proxy")
RAW = "raw-"

Widths = Mapping[str, int]


class Problem:
    """One instance: true error curves, a proxy of them, the optimum."""

    def __init__(self, surface: Surface, seed: int, noise: float, coupling: float = 0.0) -> None:
        generator = np.random.default_rng(seed)
        self.surface, self._generator = surface, generator
        self._names = surface.names
        count = len(self._names)
        self._weights = generator.lognormal(0, 0.8, count)
        self._powers = generator.uniform(0.15, 0.7, count)
        wrong = generator.lognormal(0, PROXY_ERROR, count)
        sizes = surface.cost.mapping(surface.cost.sizes)
        self._sizes = np.array([sizes[name] for name in self._names])
        factors = np.random.default_rng([seed, 1]).lognormal(0, 0.5, count - 1)
        self._coupling = coupling * factors * np.sqrt(self._weights[1:] * self._weights[:-1])
        self.truth: dict[str, np.ndarray] = {name: np.zeros(size + 1) for name, size in sizes.items()}
        self.proxy: dict[str, np.ndarray] = dict(self.truth)
        for number, name in enumerate(self._names):
            share = np.arange(sizes[name] + 1) / sizes[name]
            self.truth[name] = self._weights[number] * (1 - share ** self._powers[number])
            self.proxy[name] = wrong[number] * self.truth[name]
        self.uniform = project({}, surface.cost, surface.allowed, surface.targets)
        self._best = self._optimum() if coupling else self.value(self.knapsack(self.truth))
        self._gap = self._best - self.value(self.uniform)
        self._noise = noise * self._gap

    def knapsack(self, errors: Curves) -> dict[str, int]:
        s = self.surface
        return LeastError().widths(s.cost, errors, s.allowed, s.targets)

    def value(self, widths: Widths) -> float:
        keep = np.array([widths[name] for name in self._names]) / self._sizes
        alone = sum(self.truth[name][widths[name]] for name in self._names)
        return -float(alone + (self._coupling * np.diff(keep) ** 2).sum())

    def trained(self, widths: Widths) -> float:
        return self.value(widths) + self._noise * float(self._generator.normal())

    def score(self, widths: Widths) -> float:
        return 100 * (self._best - self.value(widths)) / self._gap

    def room(self, widths: Widths) -> float:
        """Return by which share the MACs are below the limit; negative above it."""
        cost, target = self.surface.cost, self.surface.targets[0]
        limit = target.limit(cost.reference.macs)
        return 1 - int(counter(cost, target.resource)(cost.array(widths))) / limit

    def _optimum(self) -> float:
        """Return the best value of real keep shares: concave, as MACs are linear in these widths."""
        steps = [self.surface.allowed[name] for name in self._names]
        least = {**self.uniform, **{name: int(s[0]) for name, s in zip(self._names, steps, strict=True)}}
        free = self.room(least)
        per_channel = np.array([free - self.room({**least, name: least[name] + 1}) for name in self._names])
        low = np.array([least[name] for name in self._names]) / self._sizes
        price = per_channel * self._sizes

        def lost(keep: np.ndarray) -> float:
            alone = self._weights * (1 - keep**self._powers)
            return float(alone.sum() + (self._coupling * np.diff(keep) ** 2).sum())

        def slope(keep: np.ndarray) -> np.ndarray:
            slopes = -self._weights * self._powers * keep ** (self._powers - 1)
            pull = 2 * self._coupling * np.diff(keep)
            slopes[1:] += pull
            slopes[:-1] -= pull
            return slopes

        room = {"type": "ineq", "fun": lambda keep: free - price @ (keep - low), "jac": lambda keep: -price}
        start = np.array([self.uniform[name] for name in self._names]) / self._sizes
        bounds = [(least, 1.0) for least in low]
        options = {"maxiter": 1000, "ftol": 1e-10}
        found = minimize(
            lost, start, jac=slope, method="SLSQP", bounds=bounds, constraints=[room], options=options
        )
        if not found.success:
            raise RuntimeError(f"no optimum: {found.message}")
        return -float(found.fun)


def surfaces(targets: list[str]) -> Iterator[tuple[str, Surface]]:
    traced = trace_source(resolve("resnet56"), {}, (3, 32, 32))
    allowed = SearchSpace(ignore=("conv1",)).allowed(traced.graph)
    for text in targets:
        yield text, Surface(traced.cost, allowed, [Target.parse("flops", text)])


def sampler_of(name: str, seed: int, surface: Surface, model: AdditiveModel) -> BaseSampler:
    if (
        name == "cmaes"
    ):  # in memory alone: it unpickles its state from the study, so a search does not offer it
        return optuna.samplers.CmaEsSampler(seed=seed)
    if name.startswith(RAW):
        return SAMPLERS[name.removeprefix(RAW)](seed)
    share = 0.3 if name.startswith("thompson") else 0.0
    kind = MODEL if name in MODELS else name
    return make_sampler(kind, surface.names, seed, 0, model, surface.allowed, share)


def keep_shares(trial: Trial, problem: Problem) -> dict[str, int]:
    """Return the widths of a raw trial: a keep ratio a group, above the target or not."""
    surface, widths = problem.surface, dict(problem.uniform)
    sizes = surface.cost.mapping(surface.cost.sizes)
    for name in surface.names:
        steps = surface.allowed[name]
        keep = trial.suggest_float(name, steps[0] / sizes[name], steps[-1] / sizes[name])
        widths[name] = int(np.clip(round(keep * sizes[name]), steps[0], steps[-1]))
    trial.set_constraint("macs", -problem.room(widths))
    return widths


def searched(problem: Problem, name: str, seed: int, checkpoints: list[int]) -> tuple[list[float], float]:
    """Return the score at each number of trials, and the milliseconds of CPU that a trial takes."""
    surface, raw = problem.surface, name.startswith(RAW)
    kind = PairedModel if name.startswith("pairs") else AdditiveModel
    proxy = problem.proxy if name.endswith("+proxy") else None
    model = kind(surface.cost, surface.allowed, surface.targets, proxy)
    study = optuna.create_study(direction="maximize", sampler=sampler_of(name, seed, surface, model))
    sizes = surface.cost.mapping(surface.cost.sizes)
    uniform = {group: problem.uniform[group] / sizes[group] for group in surface.names}
    study.enqueue_trial(uniform if raw else logits(problem.uniform, surface.allowed))
    rows, values, scores = [], [], []
    cpu_s = 0.0
    for number in range(1, max(checkpoints) + 1):
        start = cpu_time_s()
        trial = study.ask()
        widths = keep_shares(trial, problem) if raw else surface.suggest(trial)
        rows.append(surface.cost.array(widths))
        values.append(problem.trained(widths))
        trial.set_user_attr(WIDTHS, json.dumps(rows[-1].tolist()))
        study.tell(trial, values[-1])
        cpu_s += cpu_time_s() - start
        if number in checkpoints:
            if name in MODELS:
                model.tell(np.array(rows), values)
                answer = model.best()
            else:
                fitting = [problem.room(surface.cost.mapping(row)) >= 0 for row in rows]
                answer = surface.cost.mapping(rows[int(np.argmax(np.where(fitting, values, -math.inf)))])
            scores.append(problem.score(answer))
    return scores, 1e3 * cpu_s / max(checkpoints)


def cpu_time_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def cells(results: list[list[float]], how: Callable[..., np.ndarray]) -> str:
    return " / ".join(
        "< 0.1" if value < 0.1 else f"{value:.1f}" if value < 1 else f"{value:.0f}"
        for value in how(results, axis=0)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samplers", default="random,tpe,nsga2,raw-tpe,model,model+proxy")
    parser.add_argument("--trials", default="30,100,300")
    parser.add_argument("--targets", default="0.5,0.3")
    parser.add_argument("--noise", default="0,0.5")
    parser.add_argument("--coupling", type=float, default=0.0)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--first-seed", type=int, default=0)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    checkpoints = [int(text) for text in options.trials.split(",")]
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    print(
        f"score after {' / '.join(map(str, checkpoints))} trials; 0 optimum, 100 uniform; "
        f"seeds {seeds[0]} to {seeds[-1]}; coupling {options.coupling:g}"
    )
    print("| MACs | noise | who chooses | mean | worst instance | CPU ms a trial |")
    print("| --- | --- | --- | --- | --- | --- |")
    for text, surface in surfaces(options.targets.split(",")):
        for noise in map(float, options.noise.split(",")):
            problems = [Problem(surface, seed, noise, options.coupling) for seed in seeds]
            for name, errors in (
                ("proxy alone", "proxy"),
                *([("truth but coupling", "truth")] * bool(options.coupling)),
            ):
                alone = [[p.score(p.knapsack(getattr(p, errors)))] for p in problems]
                print(f"| {text} | {noise:g} | {name} | {cells(alone, np.mean)} | {cells(alone, np.max)} | |")
            for name in options.samplers.split(","):
                runs = [
                    searched(Problem(surface, seed, noise, options.coupling), name, seed, checkpoints)
                    for seed in seeds
                ]
                results = [scores for scores, _ in runs]
                cost = np.mean([ms for _, ms in runs])
                print(
                    f"| {text} | {noise:g} | {name} | {cells(results, np.mean)} | "
                    f"{cells(results, np.max)} | {cost:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
