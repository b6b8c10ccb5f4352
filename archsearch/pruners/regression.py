"""LASSO regression: a sparse set of channels that reproduces the next layer's outputs.

With ``beta`` weighing each channel's contribution, ``|Y - sum beta_c Z_c|^2 + lambda |beta|_1`` is solved
along its whole path from the Gram matrix of the contributions: a channel is worth the largest ``lambda`` at
which it takes part. The best ``c`` channels are then those of the solution with ``c`` of them, without a
search over ``lambda``.

That is exact as long as no channel leaves the solution again while ``lambda`` falls. Where some do, the best
``c`` are the first ``c`` that ever took part: those that left stand in for as many that came later.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import nn

from archsearch.allocation import Curves
from archsearch.graph import Selection
from archsearch.pruners.calibration import Grams, Matrix, all_filters, contribution_grams, in_total
from archsearch.pruners.curves import of_grams
from archsearch.pruners.pruner import PRUNERS, Context, Need, Scores
from archsearch.pruners.reconstruction import check_sampling, refit_readers


def entry_penalties(gram: Matrix) -> Matrix:
    """Return for each unit the largest LASSO penalty at which it takes part, ``(size,)``.

    The penalty is that of scikit-learn's ``Lasso``, times the number of samples, on the contributions and
    their sum without an intercept.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import lars_path_gram

    scale = float(np.diagonal(gram).mean()) or 1.0  # the path's tolerances are absolute
    gram = gram / scale
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # units that repeat others end the path
        penalties, _, coefficients = lars_path_gram(
            gram.sum(1), gram, n_samples=1, method="lasso", max_iter=8 * len(gram)
        )
    active = coefficients != 0
    first = np.maximum(active.argmax(1) - 1, 0)  # it enters at the knot before
    return np.asarray(np.where(active.any(1), penalties[first] * scale, 0.0))


@PRUNERS.register("regression")
@dataclass(frozen=True)
class Regression:
    """Keep the channels that LASSO regression on the next layer's outputs keeps.

    Args:
        images: Calibration images.
        places: Random output positions of each image and layer, each with all filters.
        ridge: Of the weights; see ``least_change``.
    """

    images: int = 100
    places: int = 10
    ridge: float = 1e-3

    source: ClassVar[str] = (
        "He et al., Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017, section 3.1"
    )
    allocation: ClassVar[str] = "local"
    needs: ClassVar[tuple[Need, ...]] = ("images",)

    def __post_init__(self) -> None:
        check_sampling("regression", self.images, self.places, self.ridge)

    def score(self, context: Context) -> Scores:
        """Return the penalty at which each unit enters; a group that no layer reads stays as it is."""
        return {
            name: entry_penalties(in_total(grams).matrix)
            if grams
            else np.full(context.graph.groups[name].size, np.inf)
            for name, grams in self._grams(context).items()
        }

    def curves(self, context: Context, scores: Scores) -> Curves:
        """Return the error that least squares on the kept contributions leaves."""
        return of_grams(self._grams(context), scores, refit=True)

    def inherit(self, context: Context, selection: Selection) -> nn.Module:
        """Return the small network, the layers fitted one after the other to the reference's outputs."""
        return refit_readers(context, selection, self.images, self.places, self.ridge)

    def _grams(self, context: Context) -> Grams:
        return contribution_grams(context, self.images, self.places, all_filters)
