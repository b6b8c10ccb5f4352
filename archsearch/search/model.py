"""What trained networks say about all others: a Bayesian model that adds up one curve a group.

The accuracy of widths is taken as a sum of rising, smooth utility curves, one a group. A curve is made of a
*proxy*, such as what a pruner's curve says, and of powers of the share that is kept:

    accuracy = offset + noise + sum over groups g of (a_g * proxy_g + b_g0 * log + b_g1 * sqrt + b_g2 * line)

with all weights at least 0, so that curves rise. Before anything is trained, ``a_g`` is normal around one
scale for all groups and ``b`` around 0; how wide, how large the scale and how strong the noise are estimated
from the values, by the marginal likelihood (Rasmussen and Williams, 2006, equation 2.30 and section 2.7).
Without a proxy the model starts from curves for which uniform widths are the best (``prior.py``). The smooth
curves of a group count as much as its part of the cost, so that they favour no direction either.

A training that collapsed says more about its recipe than about its widths: values that are further below
the lower quartile than three times the distance of the quartiles count as if they were there (Tukey's outer
fence).

Sums of curves are what the knapsack solves exactly, so the model's best architecture needs no search.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize
from scipy.special import ndtr, ndtri

from archsearch.allocation import Curves, LeastError
from archsearch.cost import CostModel
from archsearch.search.prior import carried, uniform_prior
from archsearch.space import Widths
from archsearch.targets import Target
from archsearch.ties import Dimensions

Floats = npt.NDArray[np.float64]

# Means and deviations of the hyper-parameters' logarithms, in deviations of the values: the scale of the
# proxy, the spread of its weights against the scale, the spread of the shape weights, and the noise.
_HYPER_MEAN = np.log([0.2, 0.5, 0.03, 0.6])
_HYPER_DEVIATION = np.array([1.0, 0.3, 1.0, 1.0])
OFFSET, PROXY, SHAPE, PAIR = range(4)
"""What a weight is of; those of proxies and shapes are at least 0."""

_OFFSET_DEVIATION = 10.0
_SWEEPS, _WARM = 300, 60


@dataclass(frozen=True)
class Hyper:
    """How wide the prior is, in standard deviations of the values; ``pair`` where the model has pairs."""

    scale: float
    spread: float
    shape: float
    noise: float
    pair: float = 0.0

    def deviations(self) -> Floats:
        """Return the prior's deviation of each kind of weight, ``(4,)``."""
        return np.array([_OFFSET_DEVIATION, self.scale * self.spread, self.shape, self.pair])


class AdditiveModel:
    """The model of one network's widths under its targets.

    Args:
        cost: The costs as functions of the widths.
        allowed: The widths that each group may have, rising.
        targets: What a recommendation meets.
        proxy: Error curves to start from, as a pruner gives them; ``None`` for those of uniform widths.
    """

    def __init__(
        self,
        cost: CostModel,
        allowed: Mapping[str, Widths],
        targets: Sequence[Target],
        proxy: Curves | None = None,
    ) -> None:
        self._cost, self._allowed, self._targets = cost, allowed, targets
        groups = {group[0]: group for group in Dimensions(cost.names, allowed).members}
        self.free = [
            column for column, name in enumerate(cost.names) if len(allowed[name]) > 1 and name in groups
        ]
        part = carried(cost, allowed, targets)
        believed = uniform_prior(cost, part) if proxy is None else proxy
        proxies = [_tied_utility(believed, allowed, groups[cost.names[c]]) for c in self.free]
        typical = float(np.mean([curve.max(initial=0.0) for curve in proxies] or [1.0])) or 1.0
        parts = [sum(part[name] for name in groups[cost.names[c]]) for c in self.free]
        shapes = [_shapes(allowed[cost.names[column]], int(cost.sizes[column])) for column in self.free]
        # One array a group, (size + 1, 4): the proxy and the three shapes at each width.
        self._curves = [
            np.stack([p / typical, *(weight * shape for shape in s)], axis=1)
            for p, s, weight in zip(proxies, shapes, parts, strict=True)
        ]
        self._each = 4
        self._kinds = np.array([OFFSET, *[PROXY, SHAPE, SHAPE, SHAPE] * len(self.free)])
        self._hyper_prior = _HYPER_MEAN, _HYPER_DEVIATION
        self._values: Floats = np.zeros(0)
        self._rows: Floats = np.zeros((0, len(self._kinds)))
        self._mean: Floats | None = None
        self.hyper = Hyper(*np.exp(_HYPER_MEAN).tolist())

    def features(self, widths: npt.ArrayLike) -> Floats:
        """Return the rows of the linear model at widths, ``(N, G) -> (N, 1 + 4 * groups with a choice)``."""
        w = np.atleast_2d(np.asarray(widths, dtype=np.int64))
        parts = [curve[w[:, column]] for curve, column in zip(self._curves, self.free, strict=True)]
        return np.concatenate([np.ones((len(w), 1)), *parts], axis=1)

    def tell(self, widths: npt.ArrayLike, values: npt.ArrayLike) -> None:
        """Take the values ``(N,)`` of all networks ``(N, G)`` that were trained so far."""
        self._values = _fenced(np.asarray(values, dtype=np.float64))
        self._rows = self.features(widths) if len(self._values) else self._rows[:0]
        # From the same start each time: what was told before leaves no trace.
        self._mean, self.hyper = None, Hyper(*np.exp(self._hyper_prior[0]).tolist())
        if len(self._values) > 1:
            self._estimate()

    @property
    def noise(self) -> float:
        """Estimated standard deviation of a value around the curves, in the values' unit."""
        return float(self.hyper.noise * self._unit)

    def weights(self) -> Floats:
        """Return the posterior mean of the weights in standard deviations of the values.

        By Gibbs sampling of the truncated normal distribution, always with the same random numbers. Before
        anything is trained the proxy stands as it is.
        """
        if not len(self._values):
            return self._prior(self.hyper)[0]
        if self._mean is None:
            self._mean = np.asarray(self._sampled(np.random.default_rng(0), _SWEEPS).mean(0))
        return self._mean

    def draw(self, seed: int) -> Curves:
        """Return error curves drawn from the posterior (Thompson sampling)."""
        return self._errors(self._sampled(np.random.default_rng(seed), 1)[-1])

    def errors(self) -> Curves:
        """Return the posterior mean as error curves, as the knapsack takes them."""
        return self._errors(self.weights())

    def at(self, targets: Sequence[Target]) -> AdditiveModel:
        """Return the same beliefs, that recommend what meets other targets."""
        other = copy.copy(self)
        other._targets = targets
        return other

    def best(self, errors: Curves | None = None) -> dict[str, int]:
        """Return the widths of least error that meet the targets: by the posterior mean, or as given."""
        return LeastError().widths(self._cost, errors or self.errors(), self._allowed, self._targets)

    def _errors(self, weights: Floats) -> Curves:
        found = {name: np.zeros(size + 1) for name, size in self._cost.mapping(self._cost.sizes).items()}
        for number, (column, curve) in enumerate(zip(self.free, self._curves, strict=True)):
            start = 1 + self._each * number
            utility = curve @ weights[start : start + self._each]
            found[self._cost.names[column]] = utility.max() - utility
        return found

    @property
    def _unit(self) -> float:
        return float(self._values.std()) or 1.0 if len(self._values) > 1 else 1.0

    def _standard(self) -> Floats:
        return (self._values - self._values.mean()) / self._unit if len(self._values) else self._values

    def _prior(self, hyper: Hyper) -> tuple[Floats, Floats]:
        """Return mean and deviation of each weight."""
        mean = np.where(self._kinds == PROXY, hyper.scale, 0.0)
        return mean, hyper.deviations()[self._kinds]

    def _precision(self) -> Floats:
        _, deviation = self._prior(self.hyper)
        precision: Floats = self._rows.T @ self._rows / self.hyper.noise**2 + np.diag(deviation**-2)
        return precision

    def _estimate(self) -> None:
        """Choose the hyper-parameters that the values make most likely."""
        values, (centre, deviation) = self._standard(), self._hyper_prior
        parts = [self._rows[:, self._kinds == kind] for kind in range(PAIR + 1)]
        grams, total = np.stack([part @ part.T for part in parts]), parts[PROXY].sum(1)

        def loss(logs: Floats) -> float:
            hyper = Hyper(*np.exp(logs).tolist())
            matrix = np.tensordot(hyper.deviations() ** 2, grams, 1)
            matrix[np.diag_indices(len(matrix))] += hyper.noise**2
            rest = values - hyper.scale * total
            factor = cho_factor(matrix, lower=True, overwrite_a=True)
            fit = 0.5 * rest @ cho_solve(factor, rest) + np.log(np.diagonal(factor[0])).sum()
            return float(fit + 0.5 * (((logs - centre) / deviation) ** 2).sum())

        bounds = [(np.log(1e-3), np.log(3.0))] * len(centre)
        # Much noise, and hardly any around curves of a shape of their own, are valleys of the likelihood.
        starts = [
            np.array([*centre[:2], np.log(shape), np.log(noise), *centre[4:]])
            for shape, noise in ((0.03, 0.6), (0.3, 0.05), (1.0, 0.005))
        ]
        found = min(
            (minimize(loss, start, method="L-BFGS-B", bounds=bounds) for start in starts),
            key=lambda result: float(result.fun),
        )
        self.hyper = Hyper(*np.exp(found.x).tolist())

    def _sampled(self, generator: np.random.Generator, count: int) -> Floats:
        """Return draws of the weights given the values, ``(count, D)``."""
        mean, deviation = self._prior(self.hyper)
        precision = self._precision()
        pull = self._rows.T @ self._standard() / self.hyper.noise**2 + mean / deviation**2
        spread = 1 / np.sqrt(np.diagonal(precision))
        rising = (self._kinds == PROXY) | (self._kinds == SHAPE)
        weights = np.linalg.solve(precision, pull)
        weights[rising] = np.maximum(weights[rising], 0.0)
        draws = np.empty((count, len(weights)))
        for sweep in range(_WARM + count):
            uniform = generator.random(len(weights))
            for at in range(len(weights)):
                rest = pull[at] - precision[at] @ weights + precision[at, at] * weights[at]
                centre = rest * spread[at] ** 2
                weights[at] = centre + spread[at] * _above(
                    -centre / spread[at] if rising[at] else -np.inf, uniform[at]
                )
            if sweep >= _WARM:
                draws[sweep - _WARM] = weights
        return draws


def _above(low: float, uniform: float) -> float:
    """Return a standard normal number above ``low`` from a uniform one."""
    if low > 5:  # so far out the tail is exponential
        return float(low - np.log1p(-uniform) / low)
    return float(-ndtri(ndtr(-low) * (1 - uniform)))


def _shapes(steps: Widths, size: int) -> list[Floats]:
    """Return rising curves from 0 at the least width to 1 at full size: logarithm, square root, line."""
    share = np.maximum(np.arange(size + 1), 0.5) / size
    low = max(float(steps[0]), 0.5) / size
    curves = [np.log(share / low) / -np.log(low)] if low < 1 else [np.zeros(size + 1)]
    curves += [(share**power - low**power) / (1 - low**power) for power in (0.5, 1.0)]
    return [np.maximum(curve, 0.0) for curve in curves]


def _fenced(values: Floats) -> Floats:
    """Return values, those beyond the lower outer fence (Tukey, 1977, section 2C) at it."""
    lower, upper = np.quantile(values, [0.25, 0.75]) if len(values) else (0.0, 0.0)
    # Where most values are equal, quartiles say nothing.
    return np.maximum(values, lower - 3 * (upper - lower)) if upper > lower else values


def _tied_utility(proxy: Curves, allowed: Mapping[str, Widths], group: Sequence[str]) -> Floats:
    """Return the utility of a tie of groups at each width of the first, ``(size + 1,)``."""
    first, *others = group
    utility = _utility(proxy[first], allowed[first])
    for name in others:
        at = _utility(proxy[name], allowed[name])[allowed[name]]
        utility = utility + np.interp(np.arange(len(utility)), allowed[first], at)
    return utility


def _utility(error: Floats, steps: Widths) -> Floats:
    """Return by how much each width is better than the least one, ``(size + 1,)``.

    An infinite error counts as twice the largest finite one.
    """
    finite = error[np.isfinite(error)]
    bounded = np.where(np.isfinite(error), error, 2 * finite.max(initial=0.0))
    return np.asarray(np.maximum(bounded[steps[0]] - bounded, 0.0))
