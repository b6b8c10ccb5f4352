"""Networks to calibrate and to test a table with: random widths, of any size or of equal MACs.

Their groups do not scatter around one share alone: what independent draws change in one group they undo in
another, so that such networks of equal MACs are all equally fast, and nothing that a search or a pruner ever
gives. The shares have a trend over the depth as well, as those of pruners do: some networks are thin at the
front, others at the back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]

SMALLEST_KEEP = 0.2
SCATTER = 0.2
"""Standard deviation of the groups' shares around the network's."""

TREND = 0.8
"""Of the shares over the depth: how much more or less the last group keeps than the first, at most."""

EQUAL = 0.02
"""Relative difference up to which MACs are called equal."""

DRAWS = 200

MOST_GONE = 0.6
"""Of the residual branches that may vanish, on average in the networks that lack most."""

Row = tuple[int, ...]


def random_widths(steps: Sequence[Integers], count: int, generator: np.random.Generator) -> Integers:
    """Return distinct random widths, ``(count, G)`` or fewer where there are no more.

    Each network has a mean share that it keeps, drawn evenly, so that small and large ones are as frequent.

    Args:
        steps: The widths that each group may have, rising.
        count: How many.
        generator: Of the draws.
    """
    found: dict[tuple[int, ...], None] = {}
    for _ in range(DRAWS * count):
        if len(found) == count:
            break
        mean = generator.uniform(SMALLEST_KEEP, 1)
        shares = generator.normal(mean, SCATTER, len(steps)) + _trend(len(steps), generator)
        found[tuple(_nearest(steps, shares.clip(0, 1)))] = None
    return np.array(list(found), dtype=np.int64).reshape(-1, len(steps))


def without_branches(
    rows: Sequence[Row], branches: Sequence[Sequence[int]], generator: np.random.Generator
) -> list[Row]:
    """Return widths, every second of them with width 0 in some of the residual branches.

    Args:
        rows: Of each network.
        branches: The columns of the groups of each branch that may vanish.
        generator: Of the draws.
    """
    thinned = []
    for number, row in enumerate(rows):
        widths = np.array(row)
        if number % 2 and branches:
            share = generator.uniform(0, MOST_GONE)
            for columns in branches:
                if generator.random() < share:
                    widths[list(columns)] = 0
        thinned.append(tuple(widths.tolist()))
    return thinned


def equal_macs_widths(
    steps: Sequence[Integers],
    macs: Callable[[Integers], Integers],
    target: int,
    count: int,
    generator: np.random.Generator,
) -> Integers:
    """Return distinct random widths of nearly equal MACs, ``(count, G)`` or fewer where there are no more.

    Args:
        steps: The widths that each group may have, rising.
        macs: Of widths.
        target: Their MACs, to within 2 %.
        count: How many.
        generator: Of the draws.
    """
    found: dict[tuple[int, ...], None] = {}
    for _ in range(DRAWS * count):
        if len(found) == count:
            break
        shares = generator.uniform(SMALLEST_KEEP, 1, len(steps)) + _trend(len(steps), generator)
        shares = shares.clip(SMALLEST_KEEP, None)
        low, high = 0.0, 1 / SMALLEST_KEEP
        for _ in range(20):
            middle = (low + high) / 2
            if macs(_nearest(steps, np.minimum(shares * middle, 1))) <= target:
                low = middle
            else:
                high = middle
        widths = _nearest(steps, np.minimum(shares * low, 1))
        for group in generator.permutation(len(steps)):
            wider = widths.copy()
            above = steps[group][steps[group] > widths[group]]
            if len(above):
                wider[group] = above[0]
                if macs(wider) <= target:
                    widths = wider
        if abs(int(macs(widths)) - target) <= EQUAL * target:
            found[tuple(widths)] = None
    return np.array(list(found), dtype=np.int64).reshape(-1, len(steps))


def _trend(groups: int, generator: np.random.Generator) -> npt.NDArray[np.float64]:
    """Return what a network's shares gain or lose over its depth, ``(G,)``."""
    trend: npt.NDArray[np.float64] = generator.uniform(-TREND, TREND) * np.linspace(-0.5, 0.5, groups)
    return trend


def _nearest(steps: Sequence[Integers], shares: npt.NDArray[np.float64]) -> Integers:
    """Return the width of each group nearest to a share of its largest, ``(G,)``."""
    return np.array(
        [step[np.abs(step - share * step[-1]).argmin()] for step, share in zip(steps, shares, strict=True)]
    )
