"""Interactions between neighbouring groups: what no sum of curves can say.

``PairedModel`` adds a product for each pair of neighbours to the additive model,

    q_gh * (2 * keep_g - 1) * (2 * keep_h - 1),

where the keep shares are stretched over what is allowed, and the weights ``q`` are normal around 0; how wide
is estimated with the rest. The best widths then maximise a sum of curves and products. That is climbed from
several starts: around the widths so far the products are curves, each group's neighbours as they stand, and
the knapsack is solved within a radius that is halved where nothing better comes out. The first start is the
best sum of curves, so what is found is at least as good in the model's eyes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from archsearch.allocation import Curves, LeastError
from archsearch.cost import CostModel
from archsearch.search.model import PAIR, AdditiveModel, Floats
from archsearch.search.project import project
from archsearch.space import Widths
from archsearch.targets import Target
from archsearch.ties import Allowed, Dimensions

_PAIR_MEAN, _PAIR_DEVIATION = np.log(0.03), 1.0
_BETTER = 1e-9


class PairedModel(AdditiveModel):
    """The additive model and products of neighbours; see ``neighbours``. Arguments as there."""

    def __init__(
        self,
        cost: CostModel,
        allowed: Mapping[str, Widths],
        targets: Sequence[Target],
        proxy: Curves | None = None,
    ) -> None:
        super().__init__(cost, allowed, targets, proxy)
        self._dimensions = Dimensions(cost.names, allowed)
        self._first, self._second = np.array(neighbours(cost, self.free), dtype=np.int64).reshape(-1, 2).T
        self._lines = [2 * curve[:, -1] / curve[-1, -1] - 1 for curve in self._curves]
        self._kinds = np.append(self._kinds, np.full(len(self._first), PAIR))
        means, deviations = self._hyper_prior
        self._hyper_prior = np.append(means, _PAIR_MEAN), np.append(deviations, _PAIR_DEVIATION)
        self._rows = np.zeros((0, len(self._kinds)))

    def features(self, widths: npt.ArrayLike) -> Floats:
        """Return the rows of the linear model at widths, ``(N, G) -> (N, D)``, the products last."""
        line = self._line(np.atleast_2d(np.asarray(widths, dtype=np.int64)))
        return np.concatenate(
            [super().features(widths), line[:, self._first] * line[:, self._second]], axis=1
        )

    def best(self, errors: Curves | None = None) -> dict[str, int]:
        """Return the best widths that were found under the targets: by the mean, or by curves as given."""
        errors = errors or self.errors()
        products = self.weights()[self._kinds == PAIR]
        best = super().best(errors)
        if not products.any():
            return best
        starts = [best, self._solved(errors, products, best, self._allowed)]
        starts.append(project({}, self._cost, self._allowed, self._targets))
        climbed = [self._climbed(errors, products, start) for start in starts]
        return min(climbed, key=lambda widths: self._lost(errors, products, widths))

    def _line(self, widths: Widths) -> Floats:
        """Return how far groups with a choice are from least to full width, -1 to 1, ``(N, F)``."""
        return np.stack([line[widths[:, c]] for line, c in zip(self._lines, self.free, strict=True)], axis=1)

    def _lost(self, errors: Curves, products: Floats, widths: Mapping[str, int]) -> float:
        line = self._line(self._cost.array(widths)[None])[0]
        alone = sum(errors[name][width] for name, width in widths.items())
        return float(alone - products @ (line[self._first] * line[self._second]))

    def _climbed(self, errors: Curves, products: Floats, widths: dict[str, int]) -> dict[str, int]:
        radius = max(map(len, self._dimensions.steps)) // 2
        while radius:
            found = self._solved(errors, products, widths, self._near(widths, radius))
            if self._lost(errors, products, found) < self._lost(errors, products, widths) - _BETTER:
                widths = found
            else:
                radius //= 2
        return widths

    def _solved(
        self, errors: Curves, products: Floats, widths: Mapping[str, int], allowed: Mapping[str, Widths]
    ) -> dict[str, int]:
        """Return the best widths if each group's neighbours stayed as they are."""
        line = self._line(self._cost.array(widths)[None])[0]
        slope = np.zeros(len(line))
        np.add.at(slope, self._first, products * line[self._second])
        np.add.at(slope, self._second, products * line[self._first])
        bent = dict(errors)
        for column, each, of_line in zip(self.free, slope, self._lines, strict=True):
            name = self._cost.names[column]
            bent[name] = bent[name] - each * of_line
            bent[name] = bent[name] - bent[name][self._allowed[name]].min()
        return LeastError().widths(self._cost, bent, allowed, self._targets)

    def _near(self, widths: Mapping[str, int], radius: int) -> Allowed:
        """Return the allowed widths at most so many places away; width 0 stays where it was allowed."""
        near = {}
        for group, steps in zip(self._dimensions.members, self._dimensions.steps, strict=True):
            place = int(np.searchsorted(steps, widths[group[0]]))
            places = np.arange(max(place - radius, 0), min(place + radius + 1, len(steps)))
            if steps[0] == 0:
                places = np.union1d(places, [0])
            near.update({name: self._allowed[name][places] for name in group})
        return Allowed(near, self._allowed.ties if isinstance(self._allowed, Allowed) else ())


def neighbours(cost: CostModel, free: Sequence[int]) -> list[tuple[int, int]]:
    """Return pairs of positions in ``free``: each group with the next one, and with the next it multiplies.

    Args:
        cost: Its MACs say which groups share a term; so do all groups that one layer reads.
        free: Columns of the groups with a choice, in the order of the network.
    """
    shared = cost.macs.quadratic[1:, 1:] + cost.macs.quadratic[1:, 1:].T
    pairs = {(at, at + 1) for at in range(len(free) - 1)}
    for at, column in enumerate(free):
        later = [other for other in range(at + 1, len(free)) if shared[column, free[other]]]
        pairs.update((at, other) for other in later[:1])
    return sorted(pairs)
