from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archsearch.allocation import LeastError, counter, reference_count
from archsearch.errors import InfeasibleError
from archsearch.models import resolve
from archsearch.pruning import uniform_widths
from archsearch.rebuild import Traced, trace_source
from archsearch.search.project import REACH, free_groups, logits, project
from archsearch.space import Bounds, SearchSpace
from archsearch.targets import Target

SHARES = st.floats(0.15, 1.0).map(lambda share: f"{share:.3f}")
RESOURCES = st.sampled_from(["flops", "params", "memory", "channels"])
SPACES = st.sampled_from(
    [SearchSpace(), SearchSpace(Bounds(0.2, 1.0, 2, 4)), SearchSpace(ignore=("conv1", "layer2.*"))]
)


@cache
def network() -> Traced:
    return trace_source(resolve("resnet20"), {}, (3, 32, 32))


def points(names: list[str], seed: int) -> dict[str, float]:
    x = np.random.default_rng(seed).uniform(-REACH, REACH, len(names))
    return dict(zip(names, x.tolist(), strict=True))


@given(SHARES, RESOURCES, SPACES, st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_a_projection_meets_the_target_leaves_no_room_and_projects_to_itself(
    share: str, resource: str, space: SearchSpace, seed: int
) -> None:
    cost, allowed = network().cost, space.allowed(network().graph)
    targets = [Target.parse(resource, share)]  # type: ignore[arg-type]
    count, limit = (
        counter(cost, targets[0].resource),
        targets[0].limit(reference_count(cost, targets[0].resource)),
    )
    try:
        widths = project(points(free_groups(allowed), seed), cost, allowed, targets)
    except InfeasibleError:
        smallest = cost.mapping([steps[0] for steps in allowed.values()])
        assert int(count(cost.array(smallest))) > limit
        return
    assert int(count(cost.array(widths))) <= limit
    for name, steps in allowed.items():
        assert widths[name] in steps
        wider = steps[steps > widths[name]]
        if len(wider):
            assert int(count(cost.array({**widths, name: int(wider[0])}))) > limit
    x = logits(widths, allowed)
    assert all(-REACH <= value <= REACH for value in x.values())
    assert project(x, cost, allowed, targets) == widths


@given(st.sampled_from(["0.7", "0.5", "0.3"]), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_less_than_the_dearest_channel_is_missing_to_a_reachable_target(share: str, seed: int) -> None:
    cost, allowed = network().cost, SearchSpace().allowed(network().graph)
    target = Target.parse("flops", share)
    widths = project(points(free_groups(allowed), seed), cost, allowed, [target])
    limit = target.limit(cost.reference.macs)
    less = cost.sizes - np.eye(len(cost.sizes), dtype=np.int64)
    dearest = int(cost.macs(cost.sizes) - cost.macs(less).min())
    assert limit - dearest < cost.of(widths).macs <= limit


@given(SHARES, st.integers(0, 10**6), st.floats(-2, 2))
@settings(max_examples=30, deadline=None)
def test_a_shift_of_all_logits_changes_nothing(share: str, seed: int, shift: float) -> None:
    cost, allowed = network().cost, SearchSpace().allowed(network().graph)
    targets = [Target.parse("channels", share)]
    x = {name: round(value, 3) for name, value in points(free_groups(allowed), seed).items()}
    shifted = {name: value + round(shift, 1) for name, value in x.items()}
    assert project(x, cost, allowed, targets) == project(shifted, cost, allowed, targets)


@given(st.integers(0, 10**6), st.integers(0, 100), st.floats(0.01, 4))
@settings(max_examples=40, deadline=None)
def test_a_group_that_is_asked_for_more_never_gets_less_than_rounding_takes(
    seed: int, group: int, more: float
) -> None:
    cost, allowed = network().cost, SearchSpace().allowed(network().graph)
    names = free_groups(allowed)
    name, x = names[group % len(names)], points(names, seed)
    targets = [Target.parse("flops", "0.5")]
    before = project(x, cost, allowed, targets)[name]
    after = project({**x, name: x[name] + more}, cost, allowed, targets)[name]
    assert after >= before - 1


@pytest.mark.parametrize("seed", range(5))
def test_several_targets_hold_at_once(seed: int) -> None:
    cost, allowed = network().cost, SearchSpace().allowed(network().graph)
    targets = [Target.parse("flops", "0.5"), Target.parse("params", "0.4"), Target.parse("memory", "0.8")]
    widths = project(points(free_groups(allowed), seed), cost, allowed, targets)
    limits = [(counter(cost, t.resource), t.limit(reference_count(cost, t.resource))) for t in targets]
    w = cost.array(widths)
    assert all(int(count(w)) <= limit for count, limit in limits)
    for number, name in enumerate(cost.names):
        if widths[name] < allowed[name][-1]:
            wider = w.copy()
            wider[number] += 1
            assert any(int(count(wider)) > limit for count, limit in limits)


def test_uniform_widths_and_those_of_a_knapsack_can_be_enqueued() -> None:
    cost, allowed = network().cost, SearchSpace().allowed(network().graph)
    targets = [Target.parse("flops", "0.4")]
    generator = np.random.default_rng(0)
    errors = {
        name: np.sort(generator.random(size + 1))[::-1] for name, size in cost.mapping(cost.sizes).items()
    }
    for widths in (
        uniform_widths(cost, allowed, targets),
        LeastError().widths(cost, errors, allowed, targets),
    ):
        assert project(logits(widths, allowed), cost, allowed, targets) == widths


def test_equal_logits_are_one_keep_ratio() -> None:
    cost, allowed = network().cost, SearchSpace().allowed(network().graph)
    widths = cost.array(project({}, cost, allowed, [Target.parse("flops", "0.5")]))
    shares = widths / cost.sizes
    assert shares.max() - shares.min() <= 1.5 / cost.sizes.min()


def test_an_impossible_target_is_refused() -> None:
    cost, allowed = network().cost, SearchSpace(Bounds(0.9)).allowed(network().graph)
    with pytest.raises(InfeasibleError, match="smallest allowed"):
        project({}, cost, allowed, [Target.parse("flops", "0.1")])
