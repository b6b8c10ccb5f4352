from __future__ import annotations

import itertools
from functools import cache
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NETWORKS
from torch import nn

from archsearch.allocation import ALLOCATIONS, Scores, global_threshold, local, select, solve
from archsearch.cost import CostModel
from archsearch.errors import InfeasibleError
from archsearch.graph import ChannelGraph
from archsearch.grouping import channel_graph
from archsearch.models import resolve
from archsearch.space import Bounds, SearchSpace
from archsearch.targets import Resource, Target

RESOURCES: tuple[Resource, ...] = tuple(r for r in get_args(Resource) if r != "latency")  # needs a table
SMALL = ["Chain", "Residual", "Concat", "Grouped", "PaddedShortcut", "Attention"]


@cache
def traced(name: str) -> tuple[CostModel, ChannelGraph]:
    model = NETWORKS[name].build()
    graph = channel_graph(model, NETWORKS[name].example())
    return CostModel(model, graph), graph


def count(cost: CostModel, target: Target, widths: dict[str, int]) -> int:
    found = cost.of(widths)
    counts = {
        "flops": found.macs,
        "params": found.params,
        "memory": found.peak_activation_bytes,
        "channels": sum(widths.values()),
    }
    return counts[target.resource]


def limit(cost: CostModel, target: Target) -> int:
    return target.limit(count(cost, target, cost.mapping(cost.sizes)))


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """A network, priorities, allowed widths, and targets that the smallest allowed widths meet."""
    name = draw(st.sampled_from(SMALL))
    cost, graph = traced(name)
    worth = st.integers(0, 5).map(float)  # few values, so that there are ties
    scores = {
        group: np.array(draw(st.lists(worth, min_size=size, max_size=size)))
        for group, size in graph.sizes.items()
    }
    priorities = ALLOCATIONS[draw(st.sampled_from(["local", "global"]))](scores)
    bounds = Bounds(
        min_keep=draw(st.sampled_from([0, 0.1, 0.3])),
        max_keep=draw(st.sampled_from([0.8, 1])),
        round_to=draw(st.sampled_from([1, 2, 3])),
    )
    allowed = SearchSpace(bounds).allowed(graph)
    least = {group: int(widths[0]) for group, widths in allowed.items()}
    targets = []
    for resource in draw(st.sets(st.sampled_from(RESOURCES), min_size=1, max_size=3)):
        lowest = count(cost, Target(resource, absolute=1), least)
        highest = count(cost, Target(resource, absolute=1), cost.mapping(cost.sizes))
        targets.append(Target(resource, absolute=draw(st.integers(lowest, highest))))
    return {"cost": cost, "priorities": priorities, "allowed": allowed, "targets": targets}


def fits(problem: dict[str, Any], widths: dict[str, int]) -> bool:
    cost = problem["cost"]
    return all(count(cost, target, widths) <= limit(cost, target) for target in problem["targets"])


@settings(max_examples=150, deadline=None)
@given(problems())
def test_no_target_is_exceeded_and_no_allowed_step_of_any_group_fits_any_more(
    problem: dict[str, Any],
) -> None:
    widths = solve(**problem)
    assert widths.keys() == problem["allowed"].keys()
    assert fits(problem, widths)
    for group, steps in problem["allowed"].items():
        assert widths[group] in steps
        larger = steps[steps > widths[group]]
        if len(larger):
            assert not fits(problem, {**widths, group: int(larger[0])})


@settings(max_examples=100, deadline=None)
@given(problems())
def test_it_keeps_all_units_above_the_lowest_threshold_that_fits(problem: dict[str, Any]) -> None:
    """Tried out one threshold after the other."""
    found = solve(**problem)
    for threshold in sorted({p for each in problem["priorities"].values() for p in each}):
        above = {}
        for group, steps in problem["allowed"].items():
            kept = int((problem["priorities"][group] >= threshold).sum())
            above[group] = int(max([step for step in steps if step <= kept], default=steps[0]))
        if fits(problem, above):
            assert all(found[group] >= width for group, width in above.items())
            break


@settings(max_examples=100, deadline=None)
@given(problems(), st.data())
def test_a_larger_target_costs_no_less(problem: dict[str, Any], data: st.DataObject) -> None:
    cost, target = problem["cost"], problem["targets"][0]
    problem["targets"] = [target]
    wider = Target(
        target.resource, absolute=data.draw(st.integers(limit(cost, target), 2 * limit(cost, target)))
    )
    small = solve(**problem)
    large = solve(**{**problem, "targets": [wider]})
    assert count(cost, target, small) <= count(cost, target, large)


def test_brute_force_over_two_groups_finds_nothing_better() -> None:
    """Of all 8 * 6 pairs of widths, none that contains the found one meets the target."""
    cost, graph = traced("Residual")
    allowed = SearchSpace(Bounds(min_keep=0)).allowed(graph)
    reference = cost.reference.macs
    for share in np.linspace(0.05, 1, 40):
        target = Target("flops", absolute=max(int(share * reference), cost.of({"stem": 1, "conv1": 1}).macs))
        found = solve(cost, local(uniform(graph)), allowed, [target])
        for pair in itertools.product(*allowed.values()):
            widths = dict(zip(allowed, map(int, pair), strict=True))
            contains = widths != found and all(widths[name] >= found[name] for name in found)
            assert not (contains and cost.of(widths).macs <= limit(cost, target))


def uniform(graph: ChannelGraph) -> Scores:
    return {name: np.ones(size) for name, size in graph.sizes.items()}


def test_the_best_channels_are_kept_whichever_group_they_are_in() -> None:
    """Two layers of 1x1 kernels on one pixel, worked out by hand: 3a + ab + 2b multiply-adds."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    graph = channel_graph(model, torch.randn(1, 3))
    cost = CostModel(model, graph)
    allowed = SearchSpace(Bounds(min_keep=0)).allowed(graph)
    priorities = {"0": np.array([9.0, 8.0, 2.0, 1.0]), "2": np.array([7.0, 6.0, 5.0, 3.0])}
    assert cost.of({"0": 2, "2": 3}).macs == 6 + 6 + 6

    def at(macs: int) -> dict[str, int]:
        return solve(cost, priorities, allowed, [Target("flops", absolute=macs)])

    assert at(6) == {"0": 1, "2": 1}  # 3 + 1 + 2
    assert at(18) == {"0": 2, "2": 3}  # everything down to priority 5
    assert at(17) == {"0": 2, "2": 2}  # 14; one more of the second is 18, one more of the first 19
    assert at(19) == {"0": 2, "2": 3}
    assert at(22) == {"0": 2, "2": 4}  # 6 + 8 + 8
    assert at(36) == {"0": 4, "2": 4}  # 12 + 16 + 8: the reference
    assert solve(cost, priorities, allowed, []) == {"0": 4, "2": 4}


def test_without_targets_everything_that_is_allowed_stays() -> None:
    cost, graph = traced("Chain")
    allowed = SearchSpace(Bounds(max_keep=0.5)).allowed(graph)
    assert solve(cost, local(uniform(graph)), allowed, []) == {"conv1": 4, "conv2": 6}


def test_a_target_that_no_width_meets_says_what_can_be_reached() -> None:
    cost, graph = traced("Chain")
    allowed = SearchSpace(Bounds(min_keep=0.5)).allowed(graph)
    least = cost.of({"conv1": 4, "conv2": 6})
    with pytest.raises(InfeasibleError) as caught:
        solve(
            cost, local(uniform(graph)), allowed, [Target.parse("flops", "10%"), Target.parse("params", "1")]
        )
    message = str(caught.value)
    assert f"{least.macs:,} ({least.macs / cost.reference.macs:.4f} of the reference)" in message
    assert f"at most {int(0.1 * cost.reference.macs):,} MACs" in message
    assert "params" not in message and "lower --min-keep" in message


def test_the_message_of_an_impossible_target_names_each_resource() -> None:
    cost, graph = traced("Chain")
    allowed = SearchSpace(Bounds(min_keep=0.9)).allowed(graph)
    targets = [Target.parse("params", "1%"), Target.parse("memory", "2")]
    with pytest.raises(InfeasibleError, match=r"params .*parameters.*; .*memory .*bytes"):
        solve(cost, local(uniform(graph)), allowed, targets)


def test_a_network_without_groups_is_refused() -> None:
    model = nn.Linear(3, 4)
    graph = channel_graph(model, torch.randn(1, 3))
    with pytest.raises(InfeasibleError, match="no channel group"):
        solve(CostModel(model, graph), {}, {}, [])


def test_multiples_floors_and_ignored_layers_hold_at_the_solution() -> None:
    cost, graph = traced("Chain")
    allowed = SearchSpace(Bounds(min_width=4, round_to=4), ignore=["conv1"]).allowed(graph)
    found = solve(cost, local(uniform(graph)), allowed, [Target.parse("flops", "0.85")])
    assert found == {"conv1": 8, "conv2": 8}  # of 4, 8 and 12
    assert cost.of(found).macs <= 0.85 * cost.reference.macs


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_the_local_allocation_keeps_the_same_share_of_every_group(share: float) -> None:
    model = resolve("resnet20").build()
    graph = channel_graph(model, torch.randn(1, 3, 32, 32))
    cost = CostModel(model, graph)
    allowed = SearchSpace(Bounds(min_keep=0)).allowed(graph)
    widths = solve(cost, local(uniform(graph)), allowed, [Target.parse("flops", share)])
    shares = np.array([width / graph.sizes[name] for name, width in widths.items()])
    assert shares.max() - shares.min() < 2 / 16  # two channels of the narrowest layers
    assert cost.of(widths).macs > 0.98 * share * cost.reference.macs


def test_the_local_allocation_orders_by_share_alone() -> None:
    assert {
        name: each.tolist() for name, each in local({"a": np.array([5.0, 1.0]), "b": np.zeros(4)}).items()
    } == {
        "a": [0.75, 0.25],
        "b": [0.875, 0.625, 0.375, 0.125],
    }


def test_the_global_allocation_compares_channels_with_their_groups_mean() -> None:
    found = global_threshold({"a": np.array([1.0, 3.0]), "b": np.array([100.0, 100.0, 400.0])})
    assert found["a"].tolist() == [1.5, 0.5]
    assert found["b"].tolist() == [2.0, 0.5, 0.5]


def test_a_group_of_zeros_goes_first() -> None:
    found = global_threshold({"a": np.zeros(3), "b": np.array([1.0, 2.0])})
    assert found["a"].tolist() == [0, 0, 0] and (found["b"] > 0).all()


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=20), st.data())
def test_a_selection_is_the_best_units_in_order(worth: list[float], data: st.DataObject) -> None:
    width = data.draw(st.integers(1, len(worth)))
    kept = select({"a": np.array(worth)}, {"a": width})["a"]
    assert len(kept) == width and (np.diff(kept) > 0).all() and kept.dtype == np.int64
    dropped = sorted(set(range(len(worth))) - set(kept.tolist()))
    for unit in dropped:
        assert all((worth[other], -other) > (worth[unit], -unit) for other in kept.tolist())


@settings(max_examples=50, deadline=None)
@given(problems())
def test_the_same_question_has_the_same_answer(problem: dict[str, Any]) -> None:
    assert solve(**problem) == solve(**problem)
