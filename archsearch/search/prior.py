"""What is believed before anything is trained: uniform widths are hard to beat.

Pruners are compared with uniform widths for a reason. So a search without a proxy starts from curves for
which uniform widths are the best, and departs from them as far as trained networks say.

Let ``E_g`` be how much of the cost group ``g`` carries where all keep the share that the target leaves: the
derivative of the cost by the logarithm of the group's width. A group is worth ``E_g * log(width)``. Costs are
sums of products of widths with positive factors, posynomials, so in logarithms of widths a target is a convex
set and this sum is linear: where its gradient is a multiple of the cost's, it has its one maximum (geometric
programming: Boyd and Vandenberghe, 2004, section 4.5). At uniform widths it is. A square root in place of the
logarithm would not do: where two groups multiply, one wide and one narrow would be better than both alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from archsearch.allocation import Curves, counter, reference_count
from archsearch.cost import CostModel
from archsearch.pruning import uniform_widths
from archsearch.space import Widths
from archsearch.targets import Target

LEAST = 0.01
"""What a group carries at least, in means of all: one that costs nothing is still worth having."""


def carried(cost: CostModel, allowed: Mapping[str, Widths], targets: Sequence[Target]) -> dict[str, float]:
    """Return how much of the tightest target's cost each group carries at uniform widths; 1 on average.

    Args:
        cost: The costs as functions of the widths.
        allowed: The widths that each group may have, rising.
        targets: What must be met.

    Raises:
        InfeasibleError: If no allowed widths do.
    """
    uniform = cost.array(uniform_widths(cost, allowed, list(targets)))
    counts = {target: counter(cost, target.resource) for target in targets}
    tightest = max(
        targets,
        key=lambda target: (
            int(counts[target](uniform)) / target.limit(reference_count(cost, target.resource))
        ),
    )
    # Between the ends and not at the point itself: latency has steps.
    ends = np.repeat(uniform[None], 2 * len(cost.names), axis=0)
    for column, name in enumerate(cost.names):
        ends[2 * column : 2 * column + 2, column] = allowed[name][0], allowed[name][-1]
    low, high = np.asarray(counts[tightest](ends), dtype=np.float64).reshape(-1, 2).T
    span = np.array([max(int(allowed[name][-1] - allowed[name][0]), 1) for name in cost.names])
    shares = np.maximum(high - low, 0.0) / span * uniform
    free = shares[[len(allowed[name]) > 1 for name in cost.names]]
    typical = float(free.mean()) if free.any() else 1.0
    return {name: max(float(share) / typical, LEAST) for name, share in zip(cost.names, shares, strict=True)}


def uniform_prior(cost: CostModel, parts: Mapping[str, float]) -> Curves:
    """Return error curves for which uniform widths are the best.

    Args:
        cost: The costs as functions of the widths.
        parts: How much each group carries at uniform widths, as ``carried`` says.
    """
    sizes = cost.mapping(cost.sizes)
    return {
        name: -part * np.log(np.maximum(np.arange(sizes[name] + 1), 0.5) / sizes[name])
        for name, part in parts.items()
    }
