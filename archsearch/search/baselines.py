"""The widths that a search is compared with, uniform ones aside: what a pruner finds at the same targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache

from archsearch.allocation import LeastError
from archsearch.pipeline import widths_by
from archsearch.plan import Plan
from archsearch.search.study import Surface
from archsearch.search.worth import Worth
from archsearch.targets import Target

Solve = Callable[[Sequence[Target]], Mapping[str, int]]
"""Returns the widths of a method at targets."""


def baseline(
    name: str, worth: Worth, surface: Surface, plan: Plan, weights: str | None, trained: bool
) -> Solve:
    """Return what gives the widths of a method at targets, each only once; what it prunes is trained now.

    Args:
        name: ``NAME`` for the allocation of its paper, or ``NAME:ALLOCATION``.
        worth: Has the reference.
        surface: What widths are allowed.
        plan: Of the search.
        weights: File with the reference's weights, if it is not trained.
        trained: Whether the weights of the reference, as it is, are trained ones.
    """
    method, _, allocation = name.partition(":")
    if (method, allocation) == (plan.method, "knapsack"):
        # The curves that the search may start from, which are known already.
        cost, curves = worth.traced.cost, worth.reference.curves
        return _once(lambda targets: LeastError().widths(cost, curves, surface.allowed, targets))
    options = plan.options if method == plan.method else {}
    asked = replace(plan, method=method, allocation=allocation or None, options=options)
    return _once(widths_by(worth.traced, asked, worth.blind, weights=weights, trained=trained, say=worth.say))


def _once(solve: Solve) -> Solve:
    """Return the same, which solves for the same targets only once: the first trials and the finals ask."""
    known = cache(solve)
    return lambda targets: known(tuple(targets))
