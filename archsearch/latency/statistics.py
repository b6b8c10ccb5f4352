"""What a handful of disturbed timings says: medians, spreads and intervals that one outlier does not move."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import binom

_TO_DEVIATION = 1.4826  # median absolute deviation to standard deviation, for normal noise


def median(values: Sequence[float]) -> float:
    """Return the middle value."""
    return float(np.median(values))


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that at least ``percent`` of the values do not exceed."""
    return float(np.percentile(values, percent, method="inverted_cdf"))


def variation(values: Sequence[float]) -> float:
    """Return the robust coefficient of variation: scaled median absolute deviation over the median.

    The plain one, deviation over mean, calls ten good timings unstable for the sake of one that another
    process disturbed, though their median has not moved.
    """
    middle = np.median(values)
    return float(_TO_DEVIATION * np.median(np.abs(np.asarray(values) - middle)) / middle)


def median_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Return the tightest pair of order statistics that holds the true median with probability ``level``.

    No shape of the noise is assumed: the count of values under the median is binomial. With too few values
    (under six at 95 %) the pair is the smallest and the largest.
    """
    ordered, count = np.sort(values), len(values)
    place = max(int(binom.ppf((1 - level) / 2, count, 0.5)), 1)  # counted from 1, from either end
    return float(ordered[place - 1]), float(ordered[count - place])
