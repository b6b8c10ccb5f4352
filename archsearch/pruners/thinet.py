"""ThiNet: keep the channels from which the next layer's outputs are computed best.

The next layer's output is a sum of channel contributions. With their Gram matrix ``G`` (see
``calibration``), the squared error of dropping the channels ``T`` is ``1_T G 1_T``: each greedy step is a few
vector operations, however many samples went into ``G``, and the choice is exactly that of the loop over
samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
from torch import nn

from archsearch.allocation import Curves
from archsearch.errors import UsageError
from archsearch.graph import Selection
from archsearch.pruners.calibration import Grams, contribution_grams, in_total, one_filter_a_place
from archsearch.pruners.curves import of_grams
from archsearch.pruners.pruner import PRUNERS, Context, Need, Scores
from archsearch.pruners.reconstruction import check_sampling, scale_kept


def removal_order(gram: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Return units in the order in which greedy removal drops them, ``(size,)``.

    Each step drops the unit that leaves the least squared sum of all dropped contributions (Luo et al., ICCV
    2017, algorithm 1).
    """
    order = np.empty(len(gram), dtype=np.int64)
    errors = np.diagonal(gram).astype(float)  # of dropping each unit, less that of those already dropped
    for step in range(len(gram)):
        order[step] = unit = int(np.argmin(errors))
        errors += 2 * gram[unit]
        errors[unit] = np.inf
    return order


def addition_order(gram: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Return units in the order in which greedy addition keeps them, ``(size,)``.

    Each step keeps the unit after which the sum of all contributions is fitted best by least squares on the
    kept ones (Luo et al., TPAMI 2019, section 3.3). The fit follows from a Cholesky factor that grows by one
    column: conditioning every unit on the kept ones costs one vector operation a step.
    """
    size = len(gram)
    order = np.empty(size, dtype=np.int64)
    left = np.ones(size, dtype=bool)
    variance = np.diagonal(gram).astype(float).copy()  # of each unit given the kept ones
    covariance = gram.sum(1)  # with the target, given the kept ones
    floor = variance.max(initial=0.0) * 1e-12
    columns = np.zeros((size, size))
    for step in range(size):
        gain = np.where(left & (variance > floor), covariance**2 / np.maximum(variance, floor or 1.0), -1.0)
        unit = int(np.argmax(gain)) if (gain >= 0).any() else int(np.argmax(left))
        order[step], left[unit] = unit, False
        if variance[unit] > floor:
            column = gram[unit] - columns[:, :step] @ columns[unit, :step]
            column /= np.sqrt(variance[unit])
            covariance = covariance - column * (covariance[unit] / np.sqrt(variance[unit]))
            variance = variance - column**2
            columns[:, step] = column
    return order


@PRUNERS.register("thinet")
@dataclass(frozen=True)
class ThiNet:
    """Keep the channels from which the next layer's outputs are computed best, chosen greedily.

    Args:
        images: Calibration images.
        places: Random output positions of each image and layer, each with one random filter.
        variant: ``"removal"`` (ICCV 2017) or ``"addition"`` with a refit in every step (TPAMI 2019).
        ridge: Of the factors; see ``least_change``.
    """

    images: int = 100
    places: int = 10
    variant: Literal["removal", "addition"] = "removal"
    ridge: float = 1e-3

    source: ClassVar[str] = "Luo et al., ThiNet, ICCV 2017, algorithm 1; TPAMI 2019, section 3.3"
    allocation: ClassVar[str] = "local"
    needs: ClassVar[tuple[Need, ...]] = ("images",)

    def __post_init__(self) -> None:
        check_sampling("thinet", self.images, self.places, self.ridge)
        if self.variant not in ("removal", "addition"):
            raise UsageError(f"thinet: variant is '{self.variant}': it must be 'removal' or 'addition'")

    def score(self, context: Context) -> Scores:
        """Return the place of each unit in the greedy order; a group that no layer reads stays as it is."""
        scores = {}
        for name, grams in self._grams(context).items():
            size = context.graph.groups[name].size
            scores[name] = np.full(size, np.inf)
            if grams:
                gram = in_total(grams).matrix
                order = removal_order(gram) if self.variant == "removal" else addition_order(gram)[::-1]
                scores[name][order] = np.arange(size) / size
        return scores

    def curves(self, context: Context, scores: Scores) -> Curves:
        """Return the error of the next layers along the greedy path, as each variant measures it."""
        return of_grams(self._grams(context), scores, refit=self.variant == "addition")

    def inherit(self, context: Context, selection: Selection) -> nn.Module:
        """Return the small network, with a factor on each channel that a layer reads, by least squares."""
        return scale_kept(context, selection, self._grams(context), self.ridge)

    def _grams(self, context: Context) -> Grams:
        return contribution_grams(context, self.images, self.places, one_filter_a_place)
