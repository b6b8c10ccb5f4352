"""What is believed before anything is trained."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from archsearch.models import resolve
from archsearch.pruning import uniform_widths
from archsearch.rebuild import Traced, trace_source
from archsearch.search.model import AdditiveModel
from archsearch.search.prior import LEAST, carried, uniform_prior
from archsearch.search.project import free_groups, project
from archsearch.search.sampler import ModelSampler
from archsearch.space import SearchSpace
from archsearch.targets import Target

HALF = [Target.parse("flops", "0.5")]


def network(name: str, **arguments: int) -> Traced:
    return trace_source(resolve(name), {"in_channels": 1, **arguments}, (1, 8, 8))


def test_what_a_group_carries_is_the_elasticity_of_the_cost() -> None:
    traced = network("conv4", input_size=8)
    allowed = SearchSpace().allowed(traced.graph)
    uniform = uniform_widths(traced.cost, allowed, HALF)
    found = carried(traced.cost, allowed, HALF)
    # By hand: MACs of the convolutions and linear layers that touch each group, at uniform widths.
    w = [uniform[name] for name in traced.cost.names]
    pixels = [64, 64, 16, 16]
    layers = [9 * 1 * w[0] * pixels[0]]
    layers += [9 * w[i] * w[i + 1] * pixels[i + 1] for i in range(3)]
    layers += [w[3] * 4 * w[4], w[4] * w[5], w[5] * 10]
    touched = np.array([layers[i] + layers[i + 1] for i in range(6)])
    assert sum(layers) == traced.cost.of(uniform).macs
    wanted = touched / touched.mean()
    assert [found[name] for name in traced.cost.names] == pytest.approx(np.maximum(wanted, LEAST))


@pytest.mark.parametrize(
    ("name", "arguments"), [("conv4", {"input_size": 8}), ("resnet20", {}), ("vgg16", {"input_size": 8})]
)
@pytest.mark.parametrize("keep", ["0.5", "0.25"])
def test_uniform_widths_are_the_best_of_the_prior(name: str, arguments: dict[str, int], keep: str) -> None:
    traced, targets = network(name, **arguments), [Target.parse("flops", keep)]
    allowed = SearchSpace().allowed(traced.graph)
    uniform = uniform_widths(traced.cost, allowed, targets)
    best = AdditiveModel(traced.cost, allowed, targets).best()
    sizes = traced.cost.mapping(traced.cost.sizes)
    for group, width in best.items():
        # A few channels either way are what is left over when whole channels meet the target.
        assert abs(width - uniform[group]) <= max(2, 0.06 * sizes[group]), group


def test_no_widths_of_a_chain_beat_uniform_ones_and_a_square_root_would_prefer_others() -> None:
    traced = network("conv4", input_size=8)
    allowed = SearchSpace(ignore=["features.conv3", "features.conv4", "fc*"]).allowed(traced.graph)
    names = [name for name in allowed if len(allowed[name]) > 1]
    uniform = uniform_widths(traced.cost, allowed, HALF)
    weight = carried(traced.cost, allowed, HALF)
    prior = uniform_prior(traced.cost, weight)
    every = np.array(list(product(*(allowed[name].tolist() for name in names))))
    widths = np.repeat(traced.cost.sizes[None], len(every), axis=0)
    columns = [traced.cost.names.index(name) for name in names]
    widths[:, columns] = every
    feasible = every[traced.cost.macs(widths) <= HALF[0].limit(traced.cost.reference.macs)]
    by_log = sum(prior[name][feasible[:, i]] for i, name in enumerate(names))
    by_root = -sum(weight[name] * np.sqrt(feasible[:, i] / uniform[name]) for i, name in enumerate(names))
    best, root = feasible[np.argmin(by_log)], feasible[np.argmin(by_root)]
    wanted = np.array([uniform[name] for name in names])
    assert len(names) == 2 and (np.abs(best - wanted) <= 2).all()
    assert np.abs(root - wanted).max() > np.abs(best - wanted).max()


def designed(traced: Traced, count: int) -> np.ndarray:
    """Return the widths of space-filling networks of half the MACs, ``(count, G)``."""
    allowed = SearchSpace().allowed(traced.graph)
    sampler = ModelSampler(free_groups(allowed), 0)
    points = [project(sampler.point(number), traced.cost, allowed, HALF) for number in range(count)]
    return np.array([traced.cost.array(point) for point in points])


def test_values_without_a_message_leave_little_to_be_won() -> None:
    traced = network("resnet20")
    allowed = SearchSpace().allowed(traced.graph)
    model = AdditiveModel(traced.cost, allowed, HALF)
    model.tell(designed(traced, 60), np.random.default_rng(0).normal(size=60))
    errors, uniform = model.errors(), uniform_widths(traced.cost, allowed, HALF)
    best, even = (sum(errors[n][w] for n, w in each.items()) for each in (model.best(), uniform))
    assert even - best < 0.5  # standard deviations of the values


def test_without_a_limit_all_channels_stay() -> None:
    traced = network("resnet20")
    model = AdditiveModel(traced.cost, SearchSpace().allowed(traced.graph), [Target.parse("flops", "1.0")])
    assert model.best() == traced.cost.mapping(traced.cost.sizes)


def test_a_collapsed_training_hardly_moves_the_model() -> None:
    traced = network("resnet20")
    widths = designed(traced, 60)
    values = 90 + np.log(widths[:, 0]) + 0.05 * np.random.default_rng(0).normal(size=60)
    model = AdditiveModel(traced.cost, SearchSpace().allowed(traced.graph), HALF)
    model.tell(widths, values)
    noise = model.noise
    values[7] = 10.0
    model.tell(widths, values)
    assert model.noise < 5 * noise
    assert model.best()["conv1"] == traced.cost.sizes[traced.cost.names.index("conv1")]
