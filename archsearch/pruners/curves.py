"""What it costs to keep fewer units of a group: the error curves that the knapsack and the search weigh.

A method that measures an error has curves of its own (``Curved``). For all others the error is what the
dropped units are worth in total.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from archsearch.allocation import Curves, Scores
from archsearch.pruners.calibration import Gram, Grams
from archsearch.pruners.pruner import Context, Pruner

Floats = npt.NDArray[np.float64]


@runtime_checkable
class Curved(Protocol):
    """A pruner that measures the error of keeping its best units."""

    def curves(self, context: Context, scores: Scores) -> Curves:
        """Return the error of keeping the best 0, 1, … units of each group, ``(size + 1,)``.

        The pipeline calls it after ``score``, with what that returned, where an allocation needs curves.
        """
        ...


def curves(pruner: Pruner, context: Context, scores: Scores) -> Curves:
    """Return a method's error curves; see ``allocation.Curves``.

    An error that would fall when fewer units are kept is raised to that of keeping more: a wider group is
    never the worse one.

    Args:
        pruner: The method.
        context: What it scored.
        scores: What it scored it with.
    """
    if isinstance(pruner, Curved):
        found = pruner.curves(context, scores)
    else:
        found = of_scores(scores, across_groups=pruner.allocation == "threshold")
    return {name: np.maximum.accumulate(error[::-1])[::-1] for name, error in found.items()}


def of_scores(scores: Scores, *, across_groups: bool) -> Curves:
    """Return what the dropped units are worth in total.

    Args:
        scores: What each unit is worth; where some are negative, what it is worth more than the least.
        across_groups: Whether scores of different groups compare; otherwise the errors are relative to the
            group's total.
    """
    finite = {name: worth[np.isfinite(worth)] for name, worth in scores.items()}
    least = {name: min(0.0, float(worth.min(initial=0.0))) for name, worth in finite.items()}
    if across_groups:
        least = dict.fromkeys(least, min(least.values(), default=0.0))
    found = {}
    for name, worth in scores.items():
        falling = -np.sort(-(worth - least[name]))
        errors = np.concatenate([np.cumsum(falling[::-1])[::-1], [0.0]])
        total = (finite[name] - least[name]).sum()
        found[name] = errors if across_groups else errors / (total or 1.0)
    return found


def best_first(worth: Floats) -> npt.NDArray[np.int64]:
    """Return units from the best to the worst, as a selection keeps them."""
    return np.argsort(-worth, kind="stable")


def of_grams(grams: Grams, scores: Scores, *, refit: bool) -> Curves:
    """Return the squared error of what the layers that read a group compute from its best units.

    The error is relative to the second moment of each layer's output (without bias), and added up over the
    layers. A group that no layer reads is given infinite errors.

    Args:
        grams: Of the contributions to each op.
        scores: What each unit is worth.
        refit: Whether the kept contributions are weighed by least squares, or stay as they are.
    """
    found = {}
    for name, worth in scores.items():
        order = best_first(worth)
        error = np.zeros(len(worth) + 1)
        for gram in grams[name].values():
            error += _relative_error(gram, order, refit)
        if not grams[name]:
            error[:-1] = np.inf
        found[name] = error
    return found


def _relative_error(gram: Gram, order: npt.NDArray[np.int64], refit: bool) -> Floats:
    if not gram.output > 0:
        return np.zeros(len(order) + 1)
    matrix = gram.matrix[np.ix_(order, order)]
    errors = least_squares_errors(matrix) if refit else dropping_errors(matrix)
    return errors / gram.output


def dropping_errors(gram: Floats) -> Floats:
    """Return the squared sum of all contributions but the first 0, 1, …, ``(size + 1,)``."""
    of_last = gram[::-1, ::-1].cumsum(0).cumsum(1).diagonal()  # of the last 1, 2, … units
    return np.concatenate([[0.0], of_last])[::-1]


def least_squares_errors(gram: Floats) -> Floats:
    """Return how far least squares on the first 0, 1, … contributions stays from the sum of all.

    The Cholesky factor of the Gram matrix makes the contributions orthogonal one after the other: each takes
    the square of its part of the sum from the error.
    """
    total = gram.sum(1)
    scale = float(np.diagonal(gram).mean())
    if not scale > 0:
        return np.zeros(len(gram) + 1)
    # Units that repeat others have nothing to add; the small ridge keeps the factor from failing there.
    factor = np.linalg.cholesky(gram + 1e-6 * scale * np.eye(len(gram)))
    parts = np.linalg.solve(factor, total) ** 2
    errors = np.concatenate([[total.sum()], total.sum() - np.cumsum(parts)])
    errors[-1] = 0.0  # all of them are the sum
    return np.asarray(np.maximum(errors, 0.0))
