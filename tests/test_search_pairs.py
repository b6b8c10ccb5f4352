from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from archsearch.models import resolve
from archsearch.rebuild import Traced, trace_source
from archsearch.search.model import AdditiveModel
from archsearch.search.pairs import PairedModel, neighbours
from archsearch.search.project import free_groups, project
from archsearch.search.sampler import ModelSampler
from archsearch.space import SearchSpace
from archsearch.targets import Target

TARGETS = [Target.parse("flops", "0.5")]
INNER = SearchSpace(ignore=("conv1", "layer*.conv2"))
TIED = SearchSpace(ignore=("conv1",), ties=[["layer1.*.conv1"]])


@cache
def network(name: str = "resnet20") -> Traced:
    return trace_source(resolve(name), {}, (3, 32, 32))


def coupled(widths: dict[str, int], names: list[str]) -> float:
    """Return a value to which neighbours of unequal keep ratios are harmful."""
    sizes = network().graph.sizes
    keep = np.array([widths[name] / sizes[name] for name in names])
    wanted = np.where(np.arange(len(names)) % 2, 0.5, 2.0)  # alone, every second group would grow
    return float((wanted * np.sqrt(keep)).sum() - 3 * (np.diff(keep) ** 2).sum())


def told(kind: type[AdditiveModel], space: SearchSpace, count: int, noise: float) -> AdditiveModel:
    cost, allowed = network().cost, space.allowed(network().graph)
    names = free_groups(allowed)
    sampler = ModelSampler(names, 1)
    designed = [project(sampler.point(number), cost, allowed, TARGETS) for number in range(count)]
    values = np.array([coupled(widths, names) for widths in designed])
    values += noise * values.std() * np.random.default_rng(0).normal(size=count)
    model = kind(cost, allowed, TARGETS)
    model.tell(np.array([cost.array(widths) for widths in designed]), values)
    return model


def test_products_find_widths_that_a_sum_of_curves_cannot() -> None:
    names = free_groups(INNER.allowed(network().graph))
    alone, paired = (
        coupled(told(kind, INNER, 150, 0.0).best(), names) for kind in (AdditiveModel, PairedModel)
    )
    best_of_many = max(
        coupled(
            project(
                dict(zip(names, np.random.default_rng(seed).uniform(-3, 3, len(names)), strict=True)),
                network().cost,
                INNER.allowed(network().graph),
                TARGETS,
            ),
            names,
        )
        for seed in range(200)
    )
    assert paired > alone and paired > best_of_many


@pytest.mark.parametrize(("space", "noise"), [(INNER, 0.5), (TIED, 0.5), (SearchSpace(), 1.0)])
def test_the_recommendation_is_no_worse_than_the_best_sum_of_curves_and_meets_the_target(
    space: SearchSpace, noise: float
) -> None:
    cost, model = network().cost, told(PairedModel, space, 40, noise)
    believed = [
        float(model.features(cost.array(widths))[0] @ model.weights())
        for widths in (model.best(), AdditiveModel.best(model))
    ]
    assert believed[0] >= believed[1] - 1e-9
    widths = model.best()
    assert cost.of(widths).macs <= TARGETS[0].limit(cost.reference.macs)
    assert len({widths[name] for name in ("layer1.0.conv1", "layer1.1.conv1")}) == 1 or space is not TIED


def test_before_anything_is_trained_there_are_no_products() -> None:
    cost, allowed = network().cost, INNER.allowed(network().graph)
    assert PairedModel(cost, allowed, TARGETS).best() == AdditiveModel(cost, allowed, TARGETS).best()


def test_neighbours_follow_each_other_or_multiply() -> None:
    cost, graph = network().cost, network().graph
    names = list(cost.names)
    inner = [names.index(name) for name in free_groups(INNER.allowed(graph))]
    assert neighbours(cost, inner) == [(at, at + 1) for at in range(8)]
    everything = list(range(len(names)))
    pairs = {(names[a], names[b]) for a, b in neighbours(cost, everything)}
    assert len(pairs) <= 2 * len(names)
    assert ("conv1", "layer1.0.conv1") in pairs  # the stream is read by the first inner layer
