"""How well latencies are predicted: the numbers that say whether a table is good enough."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import kendalltau, spearmanr

from archsearch.latency.correction import Correction
from archsearch.latency.table import FITTED, LatencyTable

Floats = npt.NDArray[np.float64]

LEAST_WITHIN_10 = 0.95
LEAST_SPEARMAN = 0.95
LEAST_SPEARMAN_EQUAL_MACS = 0.7
LEAST_COVERAGE = 0.8

FOLDS, REPEATS = 10, 5
"""Of the cross-validation that tests the interval."""


@dataclass(frozen=True)
class Accuracy:
    """How predictions compare with measurements.

    Attributes:
        networks: How many.
        mape: Mean absolute error, as a share of the measured latency.
        worst: The largest such error.
        within_5: Share of the networks with errors up to 5 %.
        within_10: Up to 10 %.
        spearman: Rank correlation.
        kendall: The other one, tau.
        spearman_equal_macs: Rank correlation among the networks of equal MACs; NaN with fewer than three.
    """

    networks: int
    mape: float
    worst: float
    within_5: float
    within_10: float
    spearman: float
    kendall: float
    spearman_equal_macs: float


def compare(predicted: Floats, measured: Floats, equal_macs: npt.NDArray[np.bool_]) -> Accuracy:
    """Compare predictions with measurements, ``(N,)``; ``equal_macs`` says which networks have equal MACs."""
    errors = np.abs(predicted / measured - 1)
    return Accuracy(
        len(measured),
        float(errors.mean()),
        float(errors.max()),
        float((errors <= 0.05).mean()),
        float((errors <= 0.10).mean()),
        rank_correlation(predicted, measured),
        float(kendalltau(predicted, measured).statistic) if np.ptp(predicted) > 0 else 0.0,
        rank_correlation(predicted[equal_macs], measured[equal_macs]),
    )


def rank_correlation(one: Floats, other: Floats) -> float:
    """Return Spearman's correlation; 0 where one says nothing, NaN with fewer than three values."""
    if len(one) < 3:
        return float("nan")
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return 0.0
    return float(spearmanr(one, other).statistic)


@dataclass(frozen=True)
class Report:
    """What a table is worth on networks that it was not fitted on.

    Attributes:
        table: Its predictions.
        others: The baselines: MACs alone, and the sum of the cells, each with its best affine fit.
        coverage: Share of the networks inside the interval that calibration networks give them.
        coverage_in_use: Share of all networks inside the interval of what predictions are, see ``inside``.
        noise: Median difference between two measurements of one network, as a share.
        equal_spread: Spread (robust) of the latencies at equal MACs, as a share; NaN with fewer than three.
        complaints: Why the table is not good enough; empty if it is.
    """

    table: Accuracy
    others: Mapping[str, Accuracy]
    coverage: float
    coverage_in_use: float
    noise: float
    equal_spread: float
    complaints: tuple[str, ...]


def assess(table: LatencyTable) -> Report:
    """Compare what calibration networks predict of the held-out ones, and baselines fitted on the same."""
    widths, measured = table.networks("held-out", "equal-macs")
    equal = np.array(
        [r.role == "equal-macs" for r in table.content.networks if r.role in ("held-out", "equal-macs")]
    )
    predicted, low, high = table.tested(widths)
    coverage = float(((low <= measured) & (measured <= high)).mean())
    in_use = float(inside(table).mean())
    found = compare(predicted, measured, equal)
    others = {name: compare(values, measured, equal) for name, values in baselines(table, widths).items()}
    spread = float("nan")
    if equal.sum() >= 3:
        q75, q50, q25 = np.percentile(measured[equal], (75, 50, 25))
        spread = float((q75 - q25) / 1.349 / q50)
    noise = repeat_noise(table)
    complaints = tuple(_complaints(found, in_use, noise, spread))
    return Report(found, others, coverage, in_use, noise, spread, complaints)


def inside(table: LatencyTable) -> npt.NDArray[np.bool_]:
    """Return which networks are inside the interval of predictions that do not know them, ``(5, N)``.

    Predictions are fitted on all networks of a table. So a tenth of them is left out in turn, and fit and
    interval are made of the rest; five times, with other tenths.

    Args:
        table: With its networks.
    """
    widths, ms = table.networks(*FITTED)
    generator = np.random.default_rng(0)
    found = np.zeros((REPEATS, len(ms)), dtype=bool)
    for repeat in found:
        fold = generator.permutation(len(ms)) % FOLDS
        for out in (fold == number for number in range(FOLDS)):
            _, low, high = table.fitted(widths[~out], ms[~out])(widths[out])
            repeat[out] = (low <= ms[out]) & (ms[out] <= high)
    return found


def baselines(table: LatencyTable, widths: npt.NDArray[np.int64]) -> dict[str, Floats]:
    """Return what MACs alone and the cells' sum alone predict, each fitted on the calibration networks."""
    calibration, ms = table.networks("calibration")
    known = {"MACs only": table.macs, "sum of cells": lambda w: table.features.of(w)[:, 0]}
    predictions = {}
    for name, feature in known.items():
        fit = Correction.fit(feature(calibration)[:, None], ms)
        predictions[name] = feature(widths) * fit.coefficients[0] + fit.constant_ms
    return predictions


def repeat_noise(table: LatencyTable) -> float:
    """Return the median difference of networks measured twice, as a share; NaN if there are none."""
    again, ms = table.networks("repeat")
    if not len(again):
        return float("nan")
    widths, first = table.networks(*FITTED)
    differences = [
        abs(value / first[np.flatnonzero((widths == row).all(1))[0]] - 1)
        for row, value in zip(again, ms, strict=True)
    ]
    return float(np.median(differences))


def _complaints(found: Accuracy, coverage: float, noise: float, spread: float) -> list[str]:
    said = []
    if found.within_10 < LEAST_WITHIN_10:
        said.append(f"only {found.within_10:.0%} of the held-out networks are within 10 %")
    if found.spearman < LEAST_SPEARMAN:
        said.append(f"the order of the held-out networks is only {found.spearman:.2f} right (Spearman)")
    if coverage < LEAST_COVERAGE:
        said.append(f"only {coverage:.0%} of the networks lie in their 90 % interval")
    if found.spearman_equal_macs < LEAST_SPEARMAN_EQUAL_MACS:
        why = f"at equal MACs the order is only {found.spearman_equal_macs:.2f} right"
        if spread < 3 * noise:
            why += (
                f"; their latencies differ by {spread:.1%} only, and one of them by {noise:.1%} from itself"
            )
        said.append(why)
    if said and noise > 0.03:
        said.append(f"the machine is noisy: one network measured twice differs by {noise:.1%}")
    return said
