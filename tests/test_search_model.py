from __future__ import annotations

import json
from functools import cache

import numpy as np
import optuna
import pytest
from scipy.stats import truncnorm

from archsearch.allocation import LeastError
from archsearch.errors import UnknownNameError, UsageError
from archsearch.models import resolve
from archsearch.rebuild import Traced, trace_source
from archsearch.search.model import AdditiveModel, _above
from archsearch.search.project import REACH, free_groups, project
from archsearch.search.sampler import SAMPLERS, WIDTHS, ModelSampler, make_sampler
from archsearch.search.study import Surface
from archsearch.space import SearchSpace
from archsearch.targets import Target

Curves = dict[str, np.ndarray]


@cache
def network() -> Traced:
    return trace_source(resolve("resnet20"), {}, (3, 32, 32))


@cache
def surface() -> Surface:
    allowed = SearchSpace(ignore=("conv1",)).allowed(network().graph)
    return Surface(network().cost, allowed, [Target.parse("flops", "0.5")])


def truth(seed: int) -> Curves:
    """Return error curves of diminishing returns, of another strength and power in each group."""
    generator = np.random.default_rng(seed)
    found = {}
    for name, size in surface().cost.mapping(surface().cost.sizes).items():
        share = np.arange(size + 1) / size
        found[name] = generator.lognormal(0, 0.8) * (1 - share ** generator.uniform(0.15, 0.7))
        if name not in surface().names:
            found[name] = np.zeros(size + 1)
    return found


def value(errors: Curves, widths: dict[str, int]) -> float:
    return -float(sum(errors[name][width] for name, width in widths.items()))


def designed(errors: Curves, count: int, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    s, sampler = surface(), ModelSampler(surface().names, seed)
    widths = [project(sampler.point(number), s.cost, s.allowed, s.targets) for number in range(count)]
    values = np.array([value(errors, w) for w in widths])
    values += noise * np.random.default_rng(seed).normal(size=count)
    return np.array([s.cost.array(w) for w in widths]), values


def model(proxy: Curves | None = None) -> AdditiveModel:
    return AdditiveModel(surface().cost, surface().allowed, surface().targets, proxy)


def gap(errors: Curves) -> tuple[float, float]:
    """Return the best value, and by how much it is above that of uniform widths."""
    s = surface()
    best = value(errors, LeastError().widths(s.cost, errors, s.allowed, s.targets))
    return best, best - value(errors, project({}, s.cost, s.allowed, s.targets))


@pytest.mark.parametrize("seed", range(3))
def test_noise_free_trials_lead_to_the_known_optimum(seed: int) -> None:
    errors, learner = truth(seed), model()
    learner.tell(*designed(errors, 60, 0.0, seed))
    best, won = gap(errors)
    assert best - value(errors, learner.best()) <= 0.03 * won


def test_noisy_trials_improve_on_a_wrong_proxy() -> None:
    left = []
    for seed in range(6):
        errors = truth(seed)
        generator = np.random.default_rng(100 + seed)
        proxy = {name: generator.lognormal(0, 0.8) * curve for name, curve in errors.items()}
        best, won = gap(errors)
        learner, scores = model(proxy), []
        for count in (0, 120):
            widths, values = designed(errors, 120, 0.5 * won, seed)
            learner.tell(widths[:count], values[:count])
            scores.append((best - value(errors, learner.best())) / won)
        left.append(scores)
    before, after = np.mean(left, axis=0)
    assert after < 0.6 * before


def test_without_trials_the_model_recommends_what_the_proxy_does() -> None:
    errors = truth(7)
    s = surface()
    assert model(errors).best() == LeastError().widths(s.cost, errors, s.allowed, s.targets)


def test_curves_never_fall_and_the_noise_is_found() -> None:
    errors = truth(1)
    learner = model()
    widths, values = designed(errors, 200, 0.2, 1)
    learner.tell(widths, 50 + values)
    for curves in (learner.errors(), learner.draw(3)):
        for name, curve in curves.items():
            steps = surface().allowed[name]
            assert (np.diff(curve[steps]) <= 1e-9).all() and curve[-1] == pytest.approx(0)
    assert learner.noise == pytest.approx(0.2, rel=0.25)


def test_draws_are_seeded_and_differ() -> None:
    learner = model()
    learner.tell(*designed(truth(2), 30, 0.3, 2))
    name = surface().names[0]
    one, same, other = (learner.draw(seed)[name] for seed in (1, 1, 2))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


@pytest.mark.parametrize("low", [-np.inf, -2.0, 0.0, 3.0, 6.0])
def test_truncated_normal_numbers_have_the_known_mean(low: float) -> None:
    uniforms = (np.arange(4000) + 0.5) / 4000
    drawn = [_above(low, u) for u in uniforms]
    expected = truncnorm(low, np.inf).mean() if np.isfinite(low) else 0.0
    assert np.mean(drawn) == pytest.approx(expected, abs=0.01)
    assert min(drawn) >= low


def test_every_second_point_mirrors_the_one_before_and_depends_on_its_number_alone() -> None:
    sampler, again = (ModelSampler(surface().names, 5) for _ in range(2))
    for number in (0, 2, 40):
        point, mirrored = again.point(number), sampler.point(number + 1)
        assert point == sampler.point(number)
        assert mirrored == {name: -x for name, x in point.items()}
        assert max(map(abs, point.values())) <= REACH
    assert sampler.point(0) != sampler.point(2)


@pytest.mark.parametrize("name", ["model", "tpe", "gp", "nsga2", "random"])
def test_every_sampler_walks_on_the_surface(name: str) -> None:
    s, errors = surface(), truth(3)
    sampler = make_sampler(name, s.names, 0, 0, model(), s.allowed, 0.5 if name == "model" else 0.0)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    limit = s.targets[0].limit(s.cost.reference.macs)
    for _ in range(14):
        trial = study.ask()
        widths = s.suggest(trial)
        assert set(trial.params) == set(s.names)
        assert s.cost.of(widths).macs <= limit
        trial.set_user_attr(WIDTHS, json.dumps(s.cost.array(widths).tolist()))
        study.tell(trial, value(errors, widths))
    assert len({trial.user_attrs[WIDTHS] for trial in study.trials}) > 10


def test_a_sampler_that_goes_on_does_not_repeat_its_first_points() -> None:
    s = surface()
    first = [
        optuna.create_study(sampler=make_sampler("random", s.names, 0, done, model(), s.allowed))
        .ask()
        .suggest_float("x", 0, 1)
        for done in (0, 20)
    ]
    assert first[0] != first[1]


def test_wrong_names_and_shares_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="sampler"):
        SAMPLERS["tep"]
    with pytest.raises(UsageError, match="thompson"):
        ModelSampler(["a"], 0, thompson=2)


@pytest.mark.slow
def test_three_hundred_trials_of_more_than_a_hundred_groups_beat_uniform_widths() -> None:
    traced = trace_source(resolve("torchvision/densenet121"), {}, (3, 224, 224))
    cost, allowed, targets = traced.cost, SearchSpace().allowed(traced.graph), [Target.parse("flops", "0.5")]
    names = free_groups(allowed)
    assert len(names) > 110
    sampler, generator = ModelSampler(names, 0), np.random.default_rng(0)
    rows = np.array(
        [cost.array(project(sampler.point(number), cost, allowed, targets)) for number in range(300)]
    )
    weights = generator.lognormal(0, 0.8, rows.shape[1])
    values = np.sqrt(rows / cost.sizes) @ weights
    values += values.std() * generator.normal(size=len(values))
    learner = AdditiveModel(cost, allowed, targets)
    learner.tell(rows, values)
    found, uniform = (cost.array(widths) for widths in (learner.best(), project({}, cost, allowed, targets)))
    assert cost.macs(found) <= targets[0].limit(cost.reference.macs)
    worth = np.sqrt(np.stack([found, uniform]) / cost.sizes) @ weights
    assert worth[0] > worth[1]
