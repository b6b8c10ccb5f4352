"""From scores and targets to widths.

An allocation orders the units of all groups by a *priority*; the solver keeps as many of the first as the
targets allow. The published presets bypass it: their widths are given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from archsearch.cost import CostModel
from archsearch.errors import InfeasibleError
from archsearch.registry import Registry
from archsearch.space import Widths
from archsearch.targets import Resource, Target

Scores: TypeAlias = Mapping[str, npt.NDArray[np.float64]]
"""What each unit of each group is worth, ``(size,)``; larger is kept, and infinite ones last of all go."""

Count: TypeAlias = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]]
"""A cost of widths, ``(..., G) -> (...)``."""

Allocation: TypeAlias = Callable[[Scores], Scores]
"""Turns scores into the priorities of keeping the best 1, 2, … units of each group, falling, ``(size,)``."""

ALLOCATIONS: Registry[Allocation] = Registry("allocation")


@ALLOCATIONS.register("local")
def local(scores: Scores) -> Scores:
    """Keep the same share of every group: one uniform keep ratio."""
    return {
        name: worth if _stays(worth) else 1 - (np.arange(len(worth)) + 0.5) / len(worth)
        for name, worth in scores.items()
    }


@ALLOCATIONS.register("global")
def global_threshold(scores: Scores) -> Scores:
    """Keep the units above one threshold, whatever their group; scores relative to their group's mean."""
    return {
        name: worth
        if _stays(worth)
        else -np.sort(-worth) / max(float(np.abs(worth).mean()), np.finfo(float).tiny)
        for name, worth in scores.items()
    }


@ALLOCATIONS.register("threshold")
def threshold(scores: Scores) -> Scores:
    """Keep the units above one threshold on the scores as they are: for methods that rank across groups."""
    return {name: -np.sort(-worth) for name, worth in scores.items()}


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
    group can grow: the result is never above a target, and no further step of any group fits.

    Args:
        cost: The costs as functions of the widths.
        priorities: Of the best 1, 2, … units of each group, falling, ``(size,)``.
        allowed: The widths that each group may have, rising.
        targets: What must be met; none keeps everything that is allowed.

    Raises:
        InfeasibleError: If the smallest allowed widths are above a target; says what can be reached.
    """
    names = cost.names
    if not names:
        raise InfeasibleError("no channel group of this network can be pruned; `archsearch show` says why")
    steps = [allowed[name] for name in names]
    falling = [-priorities[name] for name in names]
    limits = [(counter(cost, target.resource), _limit(cost, target)) for target in targets]

    def fits(widths: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Return which of the candidates ``(B, G)`` meet all targets, ``(B,)``."""
        meets = [count(widths) <= limit for count, limit in limits]
        return np.logical_and.reduce(meets) if meets else np.ones(len(widths), dtype=bool)

    def above(threshold: float) -> npt.NDArray[np.int64]:
        """Return the position in ``allowed`` of each group's width when units below the threshold go."""
        kept = [np.searchsorted(order, -threshold, side="right") for order in falling]
        return np.array(
            [
                max(0, np.searchsorted(step, width, side="right") - 1)
                for step, width in zip(steps, kept, strict=True)
            ]
        )

    def at(positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return np.array([step[position] for step, position in zip(steps, positions, strict=True)])

    positions = np.zeros(len(names), dtype=np.int64)
    if not fits(at(positions)[None])[0]:
        raise InfeasibleError(_unreachable(cost, at(positions), targets))
    thresholds = np.unique(np.concatenate([-order for order in falling]))[::-1]
    low, high = -1, len(thresholds) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if fits(at(above(thresholds[middle]))[None])[0]:
            low = middle
        else:
            high = middle - 1
    if low >= 0:
        positions = above(thresholds[low])
    growing = np.array([position < len(step) - 1 for position, step in zip(positions, steps, strict=True)])
    while growing.any():
        candidates = np.flatnonzero(growing)
        grown = np.repeat(at(positions)[None], len(candidates), axis=0)
        for row, group in enumerate(candidates):
            grown[row, group] = steps[group][positions[group] + 1]
        possible = fits(grown)
        growing[candidates[~possible]] = False  # costs only rise: what does not fit now never will
        if not possible.any():
            break
        candidates, grown = candidates[possible], grown[possible]
        order = [falling[group][grown[row, group] - 1] for row, group in enumerate(candidates)]
        best = candidates[int(np.argmin(order))]
        positions[best] += 1
        growing[best] = positions[best] < len(steps[best]) - 1
    return cost.mapping(at(positions))


def counter(cost: CostModel, resource: Resource) -> Count:
    """Return what counts a resource at given widths."""
    counts: dict[Resource, Count] = {
        "flops": cost.macs,
        "params": cost.params,
        "memory": cost.peak_activation_bytes,
        "channels": lambda widths: widths.sum(-1),
    }
    return counts[resource]


def _limit(cost: CostModel, target: Target) -> int:
    return target.limit(int(counter(cost, target.resource)(cost.sizes)))


_UNITS: Mapping[Resource, str] = {
    "flops": "MACs",
    "params": "parameters",
    "memory": "bytes",
    "channels": "channels",
}


def _unreachable(cost: CostModel, widths: npt.NDArray[np.int64], targets: Sequence[Target]) -> str:
    parts = []
    for target in targets:
        count = counter(cost, target.resource)
        least, full = int(count(widths)), int(count(cost.sizes))
        if least > _limit(cost, target):
            unit = _UNITS[target.resource]
            parts.append(
                f"the target {target} asks for at most {_limit(cost, target):,} {unit}, the smallest allowed "
                f"widths have {least:,} ({least / full:.4f} of the reference)"
            )
    return "; ".join(parts) + ". Raise the target, or lower --min-keep, --min-width or --round-to"
