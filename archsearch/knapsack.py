"""One width for each group under limits: the multiple-choice knapsack.

The sum of the groups' errors becomes least, and no cost is above its limit. Costs that are sums over the
groups make this a linear problem, solved exactly. They are not: layers couple two widths, ``c_in * c_out``.
So costs are taken along one group at a time, the others as they stand, which is exact for a step of a single
group. That problem is solved around the best widths so far, within a radius that is halved whenever nothing
better comes out. What is found is then exchanged between pairs of groups, coupling and all, until no pair has
anything to gain.

A *choice* is the position of each group's width among its allowed ones, ``(G,)``; an *option* is one allowed
width of one group; there are ``O`` options in the order of the groups, and ``K`` costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

Floats: TypeAlias = npt.NDArray[np.float64]
Integers: TypeAlias = npt.NDArray[np.int64]
Flags: TypeAlias = npt.NDArray[np.bool_]

Count: TypeAlias = Callable[[Integers], Integers]
"""A cost of widths, ``(..., G) -> (...)``; more channels cost no less."""

CELLS = 2**14
"""Resolution of a budget, where costs are finer than that."""

MOST_MOVES = 1500
"""At most so many moves of one group are paired with each other: their pairs take some milliseconds."""

LEAST_GAIN = 1e-9
"""Of the largest error of an option: what is less is rounding."""


class Knapsack:
    """Groups to choose widths for.

    Args:
        steps: The widths that each group may have, rising.
        errors: The error at each of them, finite.
        limits: Costs, and what each may be at most; the smallest widths meet them.
    """

    def __init__(
        self, steps: Sequence[Integers], errors: Sequence[Floats], limits: Sequence[tuple[Count, int]]
    ) -> None:
        self._counts = np.array([len(step) for step in steps])
        self._first = np.cumsum(self._counts) - self._counts
        self._group = np.repeat(np.arange(len(steps)), self._counts)
        self._position = np.arange(len(self._group)) - self._first[self._group]
        self._width = np.concatenate(steps)
        error = np.concatenate(errors).astype(np.float64)
        self._error = error / (error.max(initial=0.0) or 1.0)
        self._costs = [cost for cost, _ in limits]
        self._limits = np.array([limit for _, limit in limits], dtype=np.float64)
        self._units = np.maximum(self._limits, 1.0)  # what costs are divided by where they are added up

    def solve(self) -> Integers:
        """Return the widths with the least sum of errors that was found, ``(G,)``.

        They meet all limits, and no group can take its next width within them. Where the only cost is linear
        in the widths, nothing is better, to the resolution of ``CELLS``. Otherwise no change of one or two
        groups is better, as far as ``MOST_MOVES`` reach.
        """
        radius = int(self._counts.max())
        starts = [self._uniform(), self._shrunk(self._linear_optimum(self._counts - 1, radius))]
        best = min(map(self._filled, starts), key=self._total)
        while radius:
            found = self._filled(self._shrunk(self._linear_optimum(best, radius)))
            if self._total(found) < self._total(best) - LEAST_GAIN:
                best = found
            else:
                radius //= 2
        return self._widths(self._filled(self._exchanged(best)))

    def _widths(self, choices: Integers) -> Integers:
        widths: Integers = self._width[self._first + choices]
        return widths

    def _total(self, choice: Integers) -> float:
        return float(self._error[self._first + choice].sum())

    def _used(self, widths: Integers) -> Floats:
        """Return the costs of widths, ``(..., G) -> (..., K)``."""
        used = np.empty((*widths.shape[:-1], len(self._costs)))
        for number, cost in enumerate(self._costs):
            used[..., number] = cost(widths)
        return used

    def _fit(self, choices: Integers) -> Flags:
        """Return which choices meet the limits, ``(..., G) -> (...)``."""
        return np.asarray((self._used(self._widths(choices)) <= self._limits).all(-1))

    def _uniform(self) -> Integers:
        """Return the largest choice that fits with the same share of every group's options."""
        low, high = 0.0, 1.0
        for _ in range(20):
            share = (low + high) / 2
            if self._fit(np.floor(share * self._counts).astype(np.int64)):
                low = share
            else:
                high = share
        return np.floor(low * self._counts).astype(np.int64)

    def _along(self, choice: Integers) -> Floats:
        """Return what each option adds to the costs while all other groups stay as chosen, ``(O, K)``."""
        here = self._widths(choice)
        added = np.empty((len(self._width), len(self._costs)))
        for group, (first, count) in enumerate(zip(self._first, self._counts, strict=True)):
            rows = np.repeat(here[None], count, axis=0)
            rows[:, group] = self._width[first : first + count]
            added[first : first + count] = self._used(rows)
        return added - self._used(here)

    def _linear_optimum(self, choice: Integers, radius: int) -> Integers:
        """Return the best choice near another, if costs were what they are along each group.

        Several limits become one, each weighed with its price where options may be taken in part.
        """
        (near,) = np.nonzero(np.abs(self._position - choice[self._group]) <= radius)
        group, error = self._group[near], self._error[near]
        added, left = self._along(choice)[near], self._limits - self._used(self._widths(choice))
        weights = np.ones(len(left))
        if len(left) > 1:
            weights = relaxed_prices(group, error, added / self._units, left / self._units) / self._units
        best = one_of_each(group, error, added @ weights, float(left @ weights))
        found: Integers = self._position[near[best]]
        return found

    def _shrunk(self, choice: Integers) -> Integers:
        """Take single steps down until a choice fits, the one that loses least for what it saves."""
        while not self._fit(choice):
            (groups,) = np.nonzero(choice)
            rows = _stepped(choice, groups, -1)
            over = np.maximum(self._used(self._widths(choice)) - self._limits, 0.0)
            still = np.maximum(self._used(self._widths(rows)) - self._limits, 0.0)
            saved = ((over - still) / self._units).sum(-1)
            options = self._first[groups] + choice[groups]
            lost = self._error[options - 1] - self._error[options]
            choice = rows[int(np.lexsort((-saved, lost / np.maximum(saved, 1e-15)))[0])]
        return choice

    def _filled(self, choice: Integers) -> Integers:
        """Take single steps up while any fits, the one that gains most for what it costs."""

        def best(groups: Integers, rows: Integers) -> int:
            added = (self._used(self._widths(rows)) - self._used(self._widths(choices[-1]))) / self._units
            options = self._first[groups] + choices[-1][groups]
            gained = self._error[options] - self._error[options + 1]
            found = int(np.lexsort((added.sum(-1), -gained / np.maximum(added.sum(-1), 1e-15)))[0])
            choices.append(rows[found])
            return found

        choices = [choice]
        return filled(choice, self._counts, self._fit, best)

    def _exchanged(self, choice: Integers) -> Integers:
        """Change one or two groups at a time while that lowers the error and fits, the best pair first."""
        while (better := self._best_exchange(choice)) is not None:
            choice = better
        return choice

    def _best_exchange(self, choice: Integers) -> Integers | None:
        distance = np.abs(self._position - choice[self._group])
        reach = np.sort(distance)[min(MOST_MOVES, len(distance)) - 1]
        (moves,) = np.nonzero(distance <= max(reach, 1))
        group = self._group[moves]
        here = (self._first + choice)[group]
        change = self._width[moves] - self._width[here]
        error = self._error[moves] - self._error[here]
        added, left = self._along(choice)[moves], self._limits - self._used(self._widths(choice))
        gain = np.triu(error[:, None] + error)  # with a move to where a group is, a pair is a single move
        one, other = np.nonzero((gain < -LEAST_GAIN) & (group[:, None] != group))
        costs = added[one] + added[other]
        costs += self._coupling(choice)[group[one], group[other]] * (change[one] * change[other])[:, None]
        (fit,) = np.nonzero((costs <= left).all(-1))
        order = fit[np.argsort(gain[one[fit], other[fit]], kind="stable")]
        for pair in order[:100]:  # costs that are not quadratic may prove higher
            better = choice.copy()
            for move in (moves[one[pair]], moves[other[pair]]):
                better[self._group[move]] = self._position[move]
            if self._fit(better):
                return better
        return None

    def _coupling(self, choice: Integers) -> Floats:
        """Return the costs' mixed differences for a channel more in two groups, ``(G, G, K)``.

        From each group's next or previous width; exact for quadratic costs, 0 for groups without a choice.
        """
        here = self._widths(choice)
        beside = self._widths(np.where(choice + 1 < self._counts, choice + 1, np.maximum(choice - 1, 0)))
        change = (beside - here).astype(np.float64)
        once = np.repeat(here[None], len(here), axis=0)
        np.fill_diagonal(once, beside)
        one = self._used(once)
        mixed = np.zeros((len(here), len(here), len(self._costs)))
        for group in np.flatnonzero(change):
            twice = once.copy()
            twice[:, group] = beside[group]
            mixed[group] = self._used(twice) - one - one[group] + self._used(here)
        products = np.outer(change, change)[:, :, None]
        return np.divide(mixed, products, out=np.zeros_like(mixed), where=products != 0)


def filled(
    choice: Integers,
    counts: Integers,
    fit: Callable[[Integers], Flags],
    best: Callable[[Integers, Integers], int],
) -> Integers:
    """Take single steps up from a choice until none fits.

    Args:
        choice: Where to start.
        counts: Options of each group, ``(G,)``.
        fit: Returns which of the choices ``(B, G)`` fit; one that does not never will when others grow.
        best: Returns which of the groups ``(B,)`` to let grow, given the choices ``(B, G)`` that this makes.
    """
    growing = choice < counts - 1
    while growing.any():
        (groups,) = np.nonzero(growing)
        rows = _stepped(choice, groups, 1)
        fitting = fit(rows)
        growing[groups[~fitting]] = False
        if fitting.any():
            choice = rows[fitting][best(groups[fitting], rows[fitting])]
            growing &= choice < counts - 1
    return choice


def _stepped(choice: Integers, groups: Integers, step: int) -> Integers:
    """Return a choice with one of the groups a step further in each row, ``(B, G)``."""
    rows = np.repeat(choice[None], len(groups), axis=0)
    rows[np.arange(len(groups)), groups] += step
    return rows


def relaxed_prices(group: Integers, error: Floats, costs: Floats, budgets: Floats) -> Floats:
    """Return what a unit of each cost is worth where options may be taken in part, ``(K,)``.

    Args:
        group: Of each option, rising, ``(O,)``.
        error: Of each option.
        costs: Of each option, ``(O, K)``.
        budgets: ``(K,)``; some options of all groups meet them.
    """
    one_each: Any = csr_array((np.ones(len(group)), (group, np.arange(len(group)))))
    from scipy.optimize import linprog  # slow to import, and only several limits need it

    result = linprog(error, costs.T, budgets, one_each, np.ones(one_each.shape[0]), (0, None), method="highs")
    return np.zeros(len(budgets)) if result.x is None else np.maximum(-result.ineqlin.marginals, 0.0)


def one_of_each(group: Integers, error: Floats, cost: Floats, budget: float) -> Integers:
    """Return one option of each group with the least sum of errors within a budget, ``(G,)``.

    At a price of the cost, the sum of each group's least ``error + price * cost`` is a lower bound. An option
    that lifts the bound above the error of a choice within the budget is in no better choice, and goes.
    Dynamic programming over the budget chooses among those that are left, mostly a few.

    Args:
        group: Of each option, rising, ``(O,)``.
        error: Of each option.
        cost: Of each option; the cheapest of each group fit the budget together.
        budget: What they may cost together.
    """
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    sizes = np.diff(starts, append=len(group))

    def at(price: float) -> tuple[Floats, Floats, float]:
        """Return the least of each group, by how much options are above, and the cost of the least."""
        value = error + price * cost
        least = np.minimum.reduceat(value, starts)
        lift = value - np.repeat(least, sizes)
        return least, lift, float(np.minimum.reduceat(np.where(lift > 0, np.inf, cost), starts).sum())

    low, high = 0.0, 0.0
    while at(high)[2] > budget and high < 1e18:
        low, high = high, 4 * high or 1e-9 / float(np.ptp(cost))
    for _ in range(60 if high else 0):
        price = (low + high) / 2
        low, high = (price, high) if at(price)[2] > budget else (low, price)
    least, lift, total = at(high)
    gap = np.inf
    if total <= budget:
        known = np.lexsort((cost, lift > 0, group))[starts]
        gap = error[known].sum() - (least.sum() - high * budget)
    (left,) = np.nonzero(lift <= gap + LEAST_GAIN)
    return left[_best_by_budget(group[left], error[left], cost[left], budget)]


def _best_by_budget(group: Integers, error: Floats, cost: Floats, budget: float) -> Integers:
    """Return what ``one_of_each`` does, by dynamic programming over at most ``CELLS`` budgets."""
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    sizes = np.diff(starts, append=len(group))
    cheapest = np.minimum.reduceat(cost, starts)
    extra, budget = cost - np.repeat(cheapest, sizes), max(budget - cheapest.sum(), 0.0)
    unit = 0.0
    if np.array_equal(extra, np.rint(extra)) and extra.any():
        unit = float(np.gcd.reduce(extra.astype(np.int64)))
    unit = max(unit, budget / CELLS) or 1.0
    cells = int(budget / unit)
    # What is far beyond a tiny budget would be too many cells for an integer.
    used = np.ceil(np.minimum(extra, budget + 2 * unit) / unit - 1e-9).astype(np.int64)
    least = np.zeros(cells + 1)  # the error of the groups so far within each budget
    taken = np.zeros((len(starts), cells + 1), dtype=np.int64)
    for number, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        before, least = least, np.full(cells + 1, np.inf)
        for option in range(start, start + size):
            if used[option] <= cells:
                sums = before[: cells + 1 - used[option]] + error[option]
                better = sums < least[used[option] :]
                least[used[option] :][better] = sums[better]
                taken[number, used[option] :][better] = option
    found = np.empty(len(starts), dtype=np.int64)
    for number in reversed(range(len(starts))):
        found[number] = taken[number, cells]
        cells -= used[found[number]]
    return found
