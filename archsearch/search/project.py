"""From any point to an architecture that meets the target: the surface that a search walks on.

A point has a *logit* for each group, in ``[-REACH, REACH]``. One shift, added to all of them, decides how
much stays in total: a group at logit ``x`` has the share ``sigmoid(x + shift)`` of the way from its least to
its largest width, stretched so that both ends are reached at ``-REACH`` and ``REACH``. Equal logits are one
uniform keep ratio.

So each further width of a group has the shift from which it is taken. Projecting takes the widths in this
order as far as all targets allow, and then the single next ones that still fit, the nearest first, which is
rounding by the largest remainder. Nothing is random and nothing is approximate: the counts are those of the
cost polynomials, at whole widths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from archsearch.allocation import solve
from archsearch.cost import CostModel
from archsearch.space import Widths
from archsearch.targets import Target
from archsearch.ties import Dimensions

REACH = 3.0
"""Logits are in ``[-REACH, REACH]``: 0.05 to 0.95 before they are stretched."""

_END = 1 / (1 + np.exp(REACH))
_NEVER = 1e6


def free_groups(allowed: Mapping[str, Widths]) -> list[str]:
    """Return the groups that have a choice, of each tie the first: the dimensions of the search."""
    return [name for name in Dimensions(list(allowed), allowed).names if len(allowed[name]) > 1]


def project(
    x: Mapping[str, float], cost: CostModel, allowed: Mapping[str, Widths], targets: Sequence[Target]
) -> dict[str, int]:
    """Return the widths of a point: they meet all targets, and no group can take its next width.

    Args:
        x: Logits by group, for a tie that of its first one; groups without one have 0.
        cost: The costs as functions of the widths.
        allowed: The widths that each group may have, rising.
        targets: What must be met.

    Raises:
        InfeasibleError: If the smallest allowed widths are above a target.
    """
    sizes = cost.mapping(cost.sizes)
    priorities = {
        name: x.get(group[0], 0.0) - _needed(allowed[name], sizes[name])
        for group in Dimensions(cost.names, allowed).members
        for name in group
    }
    return solve(cost, priorities, allowed, targets)


def logits(widths: Mapping[str, int], allowed: Mapping[str, Widths]) -> dict[str, float]:
    """Return the point whose projection is an architecture, for the groups that have a choice.

    It is exactly this architecture where it meets the targets and none of its groups can take its next
    width, as holds for everything that the allocations and ``project`` return; one with room left is filled.
    """
    groups = {group[0]: group for group in Dimensions(list(allowed), allowed).members}
    return {
        first: float(np.mean([_needed_at(allowed[name], widths[name]) for name in groups[first]]))
        if widths[first] > allowed[first][0]
        else -REACH
        for first in free_groups(allowed)
    }


def _needed_at(steps: Widths, width: int) -> float:
    return float(_needed(steps, int(steps[-1]))[max(width, 1) - 1])


def _needed(steps: Widths, size: int) -> npt.NDArray[np.float64]:
    """Return the logit from which a group has 1, 2, … channels where nothing is shifted, ``(size,)``."""
    low, high = int(steps[0]), int(steps[-1])
    widths = np.arange(1, size + 1)
    if low == high:
        return np.where(widths <= low, -REACH, _NEVER)
    share = _END + (1 - 2 * _END) * np.clip((widths - low) / (high - low), 0, 1)
    needed = np.log(share / (1 - share))
    return np.where(widths > high, _NEVER, needed)
