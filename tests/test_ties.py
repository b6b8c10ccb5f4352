from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NETWORKS

from archsearch.allocation import LeastError, global_threshold, local, solve
from archsearch.cost import CostModel
from archsearch.grouping import channel_graph
from archsearch.models import resolve
from archsearch.pruning import uniform_widths
from archsearch.rebuild import Traced, trace_source
from archsearch.search.model import AdditiveModel
from archsearch.search.project import REACH, free_groups, logits, project
from archsearch.space import Bounds, SearchSpace
from archsearch.targets import Target
from archsearch.ties import Allowed, Dimensions

STAGES = SearchSpace(ignore=("conv1",), ties=[["layer1.*.conv1"], ["layer2.*.conv1"], ["layer3.*.conv1"]])
ACROSS = SearchSpace(Bounds(0.1, 1.0, 2, 2), ignore=("conv1",), ties=[["layer[12].*.conv1"]])


@cache
def network() -> Traced:
    return trace_source(resolve("resnet20"), {}, (3, 32, 32))


def is_tied(widths: dict[str, int], allowed: Allowed) -> bool:
    places = [
        {tuple(int(allowed[name][place]) for name in tie) for place in range(len(allowed[tie[0]]))}
        for tie in allowed.ties
    ]
    return all(
        tuple(widths[name] for name in tie) in known for tie, known in zip(allowed.ties, places, strict=True)
    )


def random_errors(seed: int, cost: CostModel) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        name: generator.lognormal() * np.append(np.sort(generator.random(size))[::-1], 0.0)
        for name, size in cost.mapping(cost.sizes).items()
    }


@given(st.sampled_from([STAGES, ACROSS]), st.sampled_from(["0.8", "0.5", "0.3"]), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_every_choice_of_widths_keeps_ties_and_targets(space: SearchSpace, share: str, seed: int) -> None:
    cost, allowed = network().cost, space.allowed(network().graph)
    target = Target.parse("flops", share)
    limit = target.limit(cost.reference.macs)
    generator = np.random.default_rng(seed)
    scores = {name: generator.random(size) for name, size in network().graph.sizes.items()}
    x = {name: float(generator.uniform(-REACH, REACH)) for name in free_groups(allowed)}
    for widths in (
        solve(cost, local(scores), allowed, [target]),
        solve(cost, global_threshold(scores), allowed, [target]),
        LeastError().widths(cost, random_errors(seed, cost), allowed, [target]),
        project(x, cost, allowed, [target]),
    ):
        assert is_tied(widths, allowed)
        assert cost.of(widths).macs <= limit
        dimensions = Dimensions(cost.names, allowed)
        leading = np.array([widths[name] for name in dimensions.names])
        for number, steps in enumerate(dimensions.steps):
            if leading[number] < steps[-1]:  # no tie and no group can take its next step
                wider = leading.copy()
                wider[number] = steps[np.searchsorted(steps, leading[number]) + 1]
                assert int(cost.macs(dimensions.spread(wider))) > limit
        assert project(logits(widths, allowed), cost, allowed, [target]) == widths


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", ["0.7", "0.4"])
def test_the_knapsack_of_two_tied_layers_in_a_row_is_that_of_trying_all(share: str, seed: int) -> None:
    case = NETWORKS["Chain"]  # conv1 (8) is read by conv2 (12): their costs multiply inside the tie
    model = case.build()
    graph = channel_graph(model, case.example())
    cost = CostModel(model, graph)
    allowed = SearchSpace(ties=[["conv*"]]).allowed(graph)
    errors = random_errors(seed, cost)
    target = Target.parse("flops", share)
    limit = target.limit(cost.reference.macs)
    fitting = [
        pair
        for pair in zip(allowed["conv1"].tolist(), allowed["conv2"].tolist(), strict=True)
        if int(cost.macs(np.array(pair))) <= limit
    ]
    best = min(fitting, key=lambda pair: errors["conv1"][pair[0]] + errors["conv2"][pair[1]])
    found = LeastError().widths(cost, errors, allowed, [target])
    assert (found["conv1"], found["conv2"]) == best


@pytest.mark.parametrize("seed", range(3))
def test_the_knapsack_of_three_tied_stages_is_that_of_trying_all(seed: int) -> None:
    cost, allowed = network().cost, STAGES.allowed(network().graph)
    errors, target = random_errors(seed, cost), Target.parse("flops", "0.5")
    dimensions = Dimensions(cost.names, allowed)
    widths = dimensions.at(np.array(list(itertools.product(*(range(len(s)) for s in dimensions.steps)))))
    lost = sum(errors[name][widths[:, column]] for column, name in enumerate(cost.names))
    fit = cost.macs(widths) <= target.limit(cost.reference.macs)
    found = LeastError().widths(cost, errors, allowed, [target])
    assert sum(errors[name][width] for name, width in found.items()) <= lost[fit].min() * 1.001


def test_uniform_widths_of_tied_stages_are_one_keep_ratio() -> None:
    cost, allowed = network().cost, STAGES.allowed(network().graph)
    widths = uniform_widths(cost, allowed, [Target.parse("flops", "0.5")])
    shares = [widths[tie[0]] / cost.mapping(cost.sizes)[tie[0]] for tie in allowed.ties]
    assert max(shares) - min(shares) <= 1.5 / 16


def test_a_tie_is_one_curve_of_the_model() -> None:
    cost, allowed = network().cost, STAGES.allowed(network().graph)
    errors, targets = random_errors(1, cost), [Target.parse("flops", "0.5")]
    model = AdditiveModel(cost, allowed, targets, errors)
    assert model.features(cost.sizes).shape == (1, 1 + 4 * 3)
    assert model.best() == LeastError().widths(cost, errors, allowed, targets)
    generator = np.random.default_rng(0)
    widths = [
        cost.array(
            project(
                dict(zip(free_groups(allowed), generator.uniform(-3, 3, 3), strict=True)),
                cost,
                allowed,
                targets,
            )
        )
        for _ in range(40)
    ]
    values = -sum(errors[name][np.array(widths)[:, column]] for column, name in enumerate(cost.names))
    model.tell(widths, values)
    assert is_tied(model.best(), allowed)


def test_what_is_left_of_ties_is_tied() -> None:
    allowed = ACROSS.allowed(network().graph)
    cost = network().cost
    widths = LeastError().widths(cost, random_errors(0, cost), allowed, [Target.parse("flops", "0.4")])
    left = allowed.up_to(widths)
    assert left.ties == allowed.ties
    for name, steps in left.items():
        assert steps[-1] == widths[name]
    for tie in left.ties:
        assert len({len(left[name]) for name in tie}) == 1


def test_widths_are_tied_at_the_nearest_place() -> None:
    allowed = Allowed({"a": np.arange(1, 9), "b": np.arange(1, 9), "c": np.arange(1, 5)}, [("a", "b")])
    assert allowed.together({"a": 2, "b": 6, "c": 3})["c"] == 3
    widths = allowed.together({"a": 6, "b": 6, "c": 3})
    assert widths == {"a": 6, "b": 6, "c": 3}
    assert allowed.together({"a": 4, "b": 5, "c": 1})["a"] in (4, 5)
