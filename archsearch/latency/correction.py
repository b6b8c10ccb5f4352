"""What is fitted on whole networks, to correct the sum of the cells.

First an affine function of a few features with no negative coefficient, by least squares of the relative
errors. The weights among them count only beyond a number that stays in the caches: a cell that is measured
alone always finds its weights there, a layer of a large network does not.

Then a factor of its own for the cells of each signature: inside a network a layer finds other things in the
caches than alone, some kinds of layers more so than others. There are more signatures than networks measured,
so the factors are drawn to one (ridge regression, the posterior mean under a normal prior).

How many weights are free, and how strongly the factors are drawn, is what predicts best the networks that are
left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls
from scipy.stats import t as student

from archsearch.errors import UsageError

Floats: TypeAlias = npt.NDArray[np.float64]

CONFIDENCE = 0.9
"""Of the interval around a prediction."""

FREEDOMS = (10.0, 20.0, 40.0)
"""Of the factors to choose from: standard deviation of a factor over that of a network's relative error."""

CACHES = (0.0, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2)
"""Weights that stay in the caches to choose from: shares of those of the largest network."""

LEAST_FACTOR = 0.1


@dataclass(frozen=True)
class Correction:
    """What turns features into the latency of a network: no negative coefficient, and a constant.

    Attributes:
        coefficients: Of the features, ``(F,)``.
        constant_ms: Of every network.
        spread: Root mean square of the relative errors with each network left out of its own fit and choice.
        degrees: Of freedom of this.
        factors: Of the part of the first feature that is each signature's, ``(S,)``; empty if all are one.
        free_weights: How much of the last feature takes no time.
    """

    coefficients: Floats
    constant_ms: float
    spread: float
    degrees: int
    factors: tuple[float, ...] = ()
    free_weights: float = 0.0

    @classmethod
    def fit(cls, features: Floats, ms: Floats, parts: Floats | None = None) -> Correction:
        """Fit measured networks by least squares of the relative errors.

        Args:
            features: Of each network, ``(N, F)``.
            ms: Measured, ``(N,)``.
            parts: Of the first feature by signature, ``(N, S)``; the last one are the weights then. ``None``
                fits an affine function and nothing else.

        Raises:
            UsageError: If there are fewer than three networks more than features.
        """
        if len(ms) < features.shape[1] + 4:
            raise UsageError(
                f"{len(ms)} calibration networks: at least {features.shape[1] + 4} are needed for "
                f"{features.shape[1]} coefficients, a constant and an honest interval"
            )
        largest = float(features[:, -1].max())
        free = [largest * share for share in CACHES] if parts is not None else [0.0]
        parts = np.zeros((len(ms), 0)) if parts is None else parts
        choices = [_columns(features, weights) for weights in free]
        squares = np.square([_left_out(each, parts, ms) for each in choices]).reshape(-1, len(ms))
        sums = squares.sum(axis=1)
        cache, freedom = divmod(int(np.argmin(sums)), len(FREEDOMS))
        # What was chosen since it predicts these networks well predicts others less well: so each network
        # counts as it does with what the others would have chosen.
        honest = squares[np.argmin(sums[:, None] - squares, axis=0), np.arange(len(ms))]
        found = _relative_fit(choices[cache], ms)
        changes = _changes(choices[cache], parts, ms, found, FREEDOMS[freedom])
        return cls(
            coefficients=found[:-1],
            constant_ms=float(found[-1]),
            spread=float(np.sqrt(honest.mean())),
            degrees=len(ms) - int(np.count_nonzero(found)),
            factors=tuple((1 + changes).tolist()),
            free_weights=free[cache],
        )

    @property
    def margin(self) -> float:
        """Half the width of the interval, as a share of the prediction: Student's t times the spread."""
        return float(student.ppf((1 + CONFIDENCE) / 2, self.degrees)) * self.spread

    def of_signature(self, number: int) -> Floats:
        """Return the coefficients of the features of one signature's layers, ``(F,)``.

        The weights are left to ``beyond_caches_ms`` where not all of them count.
        """
        coefficients = self.coefficients.copy()
        coefficients[0] *= self.factors[number] if self.factors else 1.0
        if self.free_weights:
            coefficients[-1] = 0.0
        return coefficients

    def beyond_caches_ms(self, weights: Floats) -> Floats:
        """Return what the weights of networks take that do not stay in the caches, ``(B,) -> (B,)``."""
        ms: Floats = self.coefficients[-1] * np.maximum(weights - self.free_weights, 0.0)
        return ms


def _columns(features: Floats, free_weights: float) -> Floats:
    """Return the features, the last one beyond what is free, and a column of ones, ``(N, F + 1)``."""
    beyond = np.maximum(features[:, -1:] - free_weights, 0.0)
    return np.concatenate([features[:, :-1], beyond, np.ones((len(features), 1))], axis=1)


def _left_out(columns: Floats, parts: Floats, ms: Floats) -> Floats:
    """Return the relative error of each network with it left out of its own fit, ``(freedoms, N)``."""
    errors = np.empty((len(FREEDOMS), len(ms)))
    for out in range(len(ms)):
        rest = np.arange(len(ms)) != out
        found = _relative_fit(columns[rest], ms[rest])
        for row, freedom in enumerate(FREEDOMS):
            changes = _changes(columns[rest], parts[rest], ms[rest], found, freedom)
            predicted = columns[out] @ found + found[0] * parts[out] @ changes
            errors[row, out] = ms[out] / predicted - 1
    return errors


def _relative_fit(columns: Floats, ms: Floats) -> Floats:
    """Return the coefficients of the columns, ``(F + 1,)``, none negative."""
    scale = np.maximum(columns.max(axis=0), np.finfo(float).tiny)
    found, _ = nnls(columns / scale / ms[:, None], np.ones(len(ms)))
    coefficients: Floats = found / scale
    return coefficients


def _changes(columns: Floats, parts: Floats, ms: Floats, coefficients: Floats, freedom: float) -> Floats:
    """Return how far each factor is from one, ``(S,)``, given the coefficients of the columns."""
    shares = coefficients[0] * parts / ms[:, None]
    rest = 1 - columns @ coefficients / ms
    ridge = np.eye(parts.shape[1]) / freedom**2
    changes: Floats = np.linalg.solve(shares.T @ shares + ridge, shares.T @ rest)
    return np.maximum(changes, LEAST_FACTOR - 1)
