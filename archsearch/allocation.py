"""From scores and targets to widths.

Most allocations order the units of all groups by a *priority*; the solver keeps as many of the first as the
targets allow. The knapsack asks instead what each width of a group costs in error, and takes the widths with
the least error in total. The published presets bypass both: their widths are given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from archsearch.cost import CostModel
from archsearch.errors import InfeasibleError, UsageError
from archsearch.knapsack import Count, Knapsack, filled
from archsearch.registry import Registry
from archsearch.space import Widths
from archsearch.targets import Resource, Target
from archsearch.ties import Dimensions

Scores: TypeAlias = Mapping[str, npt.NDArray[np.float64]]
"""What each unit of each group is worth, ``(size,)``; larger is kept, and infinite ones last of all go."""

Curves: TypeAlias = Mapping[str, npt.NDArray[np.float64]]
"""The error of keeping the best 0, 1, … units of each group, falling to 0, ``(size + 1,)``.

Errors of different groups compare, and add up. Infinite ones say that a group stays as long as it can.
"""

Ordering: TypeAlias = Callable[[Scores], Scores]
"""Turns scores into the priorities of keeping the best 1, 2, … units of each group, falling, ``(size,)``."""


@runtime_checkable
class Solving(Protocol):
    """An allocation that finds the widths itself, from error curves."""

    def widths(
        self, cost: CostModel, curves: Curves, allowed: Mapping[str, Widths], targets: Sequence[Target]
    ) -> dict[str, int]:
        """Return widths that meet every target; see ``solve``."""
        ...


Allocation: TypeAlias = "Ordering | Solving"

ALLOCATIONS: Registry[Allocation] = Registry("allocation")


def local(scores: Scores) -> Scores:
    """Keep the same share of every group: one uniform keep ratio."""
    return {
        name: worth if _stays(worth) else 1 - (np.arange(len(worth)) + 0.5) / len(worth)
        for name, worth in scores.items()
    }


def global_threshold(scores: Scores) -> Scores:
    """Keep the units above one threshold, whatever their group; scores relative to their group's mean."""
    return {
        name: worth
        if _stays(worth)
        else -np.sort(-worth) / max(float(np.abs(worth).mean()), np.finfo(float).tiny)
        for name, worth in scores.items()
    }


def threshold(scores: Scores) -> Scores:
    """Keep the units above one threshold on the scores as they are: for methods that rank across groups."""
    return {name: -np.sort(-worth) for name, worth in scores.items()}


class LeastError:
    """Keep the widths with the least sum of the groups' error curves: a knapsack."""

    def widths(
        self, cost: CostModel, curves: Curves, allowed: Mapping[str, Widths], targets: Sequence[Target]
    ) -> dict[str, int]:
        """Return widths that meet every target; see ``solve``.

        Where an error is infinite, its group keeps as much as it may. If that is above a target, the groups
        with such errors share what the others leave at their smallest, by the share that each drops.

        Raises:
            InfeasibleError: If the smallest allowed widths are above a target.
        """
        dimensions = Dimensions(cost.names, allowed)
        whole = _after(dimensions.spread, whole_branches(cost, allowed))
        limits = [
            (_after(dimensions.spread, count), limit) for count, limit in _limits(cost, allowed, targets)
        ]
        steps = dimensions.steps
        errors = dimensions.summed({name: curves[name][allowed[name]] for name in cost.names})
        finite = [np.flatnonzero(np.isfinite(error)) for error in errors]
        best = [step[at] if len(at) else step[-1:] for step, at in zip(steps, finite, strict=True)]
        if _fits(limits, np.array([step[0] for step in best])):
            known = [error[at] if len(at) else np.zeros(1) for error, at in zip(errors, finite, strict=True)]
            return cost.mapping(whole(Knapsack(best, known, limits).solve()))
        missing = {name: 1 - allowed[name] / size for name, size in zip(cost.names, cost.sizes, strict=True)}
        dropped = [
            lost if np.isinf(error).any() else np.zeros(len(lost))
            for lost, error in zip(dimensions.summed(missing), errors, strict=True)
        ]
        return cost.mapping(whole(Knapsack(steps, dropped, limits).solve()))


ALLOCATIONS.register("local")(local)
ALLOCATIONS.register("global")(global_threshold)
ALLOCATIONS.register("threshold")(threshold)
ALLOCATIONS.register("knapsack")(LeastError())


def allocate(
    name: str,
    cost: CostModel,
    scores: Scores,
    curves: Callable[[], Curves],
    allowed: Mapping[str, Widths],
    targets: Sequence[Target],
) -> dict[str, int]:
    """Return the widths that an allocation finds.

    Args:
        name: Of the allocation.
        cost: The costs as functions of the widths.
        scores: What each unit is worth.
        curves: Returns the error curves; called where the allocation needs them.
        allowed: The widths that each group may have, rising.
        targets: What must be met; none keeps everything that is allowed.

    Raises:
        InfeasibleError: If the smallest allowed widths are above a target; says what can be reached.
    """
    allocation = ALLOCATIONS[name]
    if isinstance(allocation, Solving):
        return allocation.widths(cost, curves(), allowed, targets)
    return solve(cost, allocation(scores), allowed, targets)


def _stays(worth: npt.NDArray[np.float64]) -> bool:
    return bool(np.isinf(worth).all())


def select(scores: Scores, widths: Mapping[str, int]) -> dict[str, Widths]:
    """Keep the best units of each group; among equals the first. The result is sorted."""
    return {
        name: np.sort(np.argsort(-worth, kind="stable")[: widths[name]]).astype(np.int64)
        for name, worth in scores.items()
    }


def solve(
    cost: CostModel,
    priorities: Scores,
    allowed: Mapping[str, Widths],
    targets: Sequence[Target],
) -> dict[str, int]:
    """Return the widths that keep the units of highest priority and meet every target.

    First the largest set above one threshold that fits, then single steps in the order of priority, until no
    group can grow: the result is never above a target, and no further step of any group fits. A tie takes its
    steps by the mean of its groups' priorities. The groups of a residual branch that may vanish have width 0
    only where none of their units is above the threshold, and take the first step together.

    Args:
        cost: The costs as functions of the widths.
        priorities: Of the best 1, 2, … units of each group, falling, ``(size,)``.
        allowed: The widths that each group may have, rising.
        targets: What must be met; none keeps everything that is allowed.

    Raises:
        InfeasibleError: If the smallest allowed widths are above a target; says what can be reached.
    """
    limits, whole = _limits(cost, allowed, targets), whole_branches(cost, allowed)
    dimensions = Dimensions(cost.names, allowed)
    falling = dimensions.summed(
        {name: -priorities[name][_last_units(allowed[name])] for name in cost.names}, mean=True
    )

    def above(threshold: float) -> Widths:
        """Return the place in ``allowed`` of each dimension's width when units below the threshold go."""
        taken = [np.searchsorted(order, -threshold, side="right") for order in falling]
        return np.maximum(np.array(taken, dtype=np.int64) - 1, 0)

    def fit(places: Widths) -> npt.NDArray[np.bool_]:
        return _fits(limits, dimensions.at(places))

    def first(growing: Widths, grown: Widths) -> int:
        """Return which dimension's next unit has the highest priority."""
        order = [falling[dimension][grown[row, dimension]] for row, dimension in enumerate(growing)]
        return int(np.argmin(order))

    places = np.zeros(len(falling), dtype=np.int64)
    thresholds = np.unique(np.concatenate([-order for order in falling]))[::-1]
    low, high = -1, len(thresholds) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if fit(above(thresholds[middle])):
            low = middle
        else:
            high = middle - 1
    if low >= 0:
        places = above(thresholds[low])
    counts = np.array([len(order) for order in falling])
    return cost.mapping(whole(dimensions.at(filled(places, counts, fit, first))))


def _last_units(steps: Widths) -> Widths:
    """Return the unit that decides whether each step is taken: its last; but the first of a whole branch."""
    units = np.maximum(steps - 1, 0)
    if steps[0] == 0:
        units[1:2] = 0
    return units


def whole_branches(cost: CostModel, allowed: Mapping[str, Widths]) -> Callable[[Widths], Widths]:
    """Return what makes widths ``(..., G)`` right where only some groups of a residual branch have width 0.

    These get the smallest width that is allowed and is not 0.
    """
    steps = [allowed[name] for name in cost.names]
    branches = [branch for branch in cost.branches if all(steps[group][0] == 0 for group in branch)]
    least = np.array([step[1] if step[0] == 0 else 0 for step in steps])

    def whole(widths: Widths) -> Widths:
        made = widths.copy()
        for branch in branches:
            some = widths[..., branch].any(-1, keepdims=True)
            made[..., branch] = np.maximum(made[..., branch], some * least[branch])
        return made

    return whole


def _limits(
    cost: CostModel, allowed: Mapping[str, Widths], targets: Sequence[Target]
) -> list[tuple[Count, int]]:
    """Return what each target counts and its limit.

    Raises:
        InfeasibleError: If there is no group, or the smallest allowed widths are above a target.
    """
    if not cost.names:
        raise InfeasibleError("no channel group of this network can be pruned; `archsearch show` says why")
    whole = whole_branches(cost, allowed)
    limits = [(_after(whole, counter(cost, target.resource)), _limit(cost, target)) for target in targets]
    smallest = np.array([allowed[name][0] for name in cost.names])
    if not _fits(limits, smallest):
        raise InfeasibleError(_unreachable(cost, smallest, targets))
    return limits


def _after(make: Callable[[Widths], Widths], count: Callable[[Widths], Widths]) -> Count:
    return lambda widths: count(make(widths))


def _fits(limits: Sequence[tuple[Count, int]], widths: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Return which widths meet all limits, ``(..., G) -> (...)``."""
    fits = np.ones(widths.shape[:-1], dtype=bool)
    for count, limit in limits:
        fits &= count(widths) <= limit
    return fits


def counter(cost: CostModel, resource: Resource) -> Count:
    """Return what counts a resource at given widths.

    Raises:
        UsageError: If it is latency, and no table tells it.
    """
    if resource == "latency":
        if cost.latency is None:
            raise UsageError("--latency: nothing tells how long widths take: give --table FILE")
        return cost.latency.upper_ns
    counts: dict[Resource, Count] = {
        "flops": cost.macs,
        "params": cost.params,
        "memory": cost.peak_activation_bytes,
        "channels": lambda widths: widths.sum(-1),
    }
    return counts[resource]


def _limit(cost: CostModel, target: Target) -> int:
    return target.limit(reference_count(cost, target.resource))


def reference_count(cost: CostModel, resource: Resource) -> int:
    """Return what the reference needs of a resource; its latency is the measured one, not the bound."""
    if resource == "latency" and cost.latency is not None:
        return cost.latency.reference_ns
    return int(counter(cost, resource)(cost.sizes))


_UNITS: Mapping[Resource, str] = {
    "flops": "MACs",
    "params": "parameters",
    "memory": "bytes",
    "channels": "channels",
    "latency": "nanoseconds",
}


def _unreachable(cost: CostModel, widths: npt.NDArray[np.int64], targets: Sequence[Target]) -> str:
    parts = []
    for target in targets:
        count = counter(cost, target.resource)
        least, full = int(count(widths)), reference_count(cost, target.resource)
        if least > _limit(cost, target):
            unit = _UNITS[target.resource]
            parts.append(
                f"the target {target} asks for at most {_limit(cost, target):,} {unit}, the smallest allowed "
                f"widths have {least:,} ({least / full:.4f} of the reference)"
            )
    return "; ".join(parts) + ". Raise the target, or lower --min-keep, --min-width or --round-to"
