"""How well each objective ranks networks, measured before a search: whether a search makes sense at all.

A few space-filling networks of the target are trained in full, each with two seeds. An objective's rank
correlation with these trainings says how much of what it tells is true, and that of the two trainings with
each other is what a full training itself reaches: no objective that is trained does much better. One that
knew the true accuracies would reach about the square root of it (Spearman, 1904, correction for attenuation).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import ConstantInputWarning, kendalltau, spearmanr

from archsearch.errors import ArchsearchError
from archsearch.search.facts import CALIBRATION
from archsearch.search.project import project
from archsearch.search.quest import Quest
from archsearch.search.sampler import ModelSampler
from archsearch.search.study import Surface
from archsearch.search.worth import Worth

Floats = npt.NDArray[np.float64]

RESAMPLES = 500
HEADER = ("objective", "Spearman", "95 %", "Kendall", "95 %")


@dataclass(frozen=True)
class Correlation:
    """The rank correlations of an objective with full trainings, and 95 % bootstrap intervals."""

    spearman: float
    spearman_low: float
    spearman_high: float
    kendall: float
    kendall_low: float
    kendall_high: float

    @classmethod
    def of(cls, values: Sequence[float], trainings: Sequence[Sequence[float]], seed: int) -> Correlation:
        """Correlate values with trainings: the mean over the trainings' seeds, networks resampled.

        Args:
            values: Of each network, ``(K,)``.
            trainings: Accuracies of each network, ``(K,)``, with each seed.
            seed: Of the bootstrap.
        """
        x, truths = np.asarray(values, dtype=np.float64), np.asarray(trainings, dtype=np.float64)
        generator = np.random.default_rng(seed)
        picks = generator.integers(0, len(x), (RESAMPLES, len(x)))
        drawn = np.array([_ranks(x[pick], truths[:, pick]) for pick in picks])
        spearman, kendall = _ranks(x, truths)
        return cls(spearman, *_interval(drawn[:, 0]), kendall, *_interval(drawn[:, 1]))


@dataclass(frozen=True)
class Calibration:
    """How well objectives rank.

    Attributes:
        networks: How many were trained.
        objectives: By name; ``full`` is one full training against another.
    """

    networks: int
    objectives: Mapping[str, Correlation]

    @classmethod
    def of(
        cls, objectives: Mapping[str, Sequence[float]], trainings: Sequence[Sequence[float]], seed: int
    ) -> Calibration:
        """Compare objectives with the full trainings of the same networks with two seeds.

        Args:
            objectives: The values ``(K,)`` of each; a network without a value (NaN) is left out of all.
            trainings: Two lists of accuracies, likewise.
            seed: Of the bootstrap.
        """
        table = np.array([*objectives.values(), *trainings], dtype=np.float64)
        whole = table[:, np.isfinite(table).all(0)]
        if whole.shape[1] < 3:
            raise ArchsearchError("--calibrate: fewer than 3 networks have all values, most diverged")
        *values, first, second = whole.tolist()
        found = {
            name: Correlation.of(each, [first, second], seed)
            for name, each in zip(objectives, values, strict=True)
        }
        return cls(len(first), {**found, "full": Correlation.of(first, [second], seed)})

    @property
    def ceiling(self) -> float:
        """The Spearman correlation that an objective without any error would reach."""
        return sqrt(max(0.0, self.objectives["full"].spearman))

    def lines(self) -> Iterable[str]:
        """Yield what people read."""
        yield f"rank correlation with full training, {self.networks} networks of the target"
        for row in [HEADER, *self.rows()]:
            yield "{:<10} {:>8}  {:<16} {:>8}  {}".format(*row)
        yield f"an objective without any error would reach {self.ceiling:.2f} (Spearman)"

    def rows(self) -> list[tuple[str, ...]]:
        """Return the cells of the table, under ``HEADER``."""
        return [
            (
                name,
                f"{each.spearman:.2f}",
                f"{each.spearman_low:.2f} to {each.spearman_high:.2f}",
                f"{each.kendall:.2f}",
                f"{each.kendall_low:.2f} to {each.kendall_high:.2f}",
            )
            for name, each in self.objectives.items()
        ]

    def facts(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        plain = {name: _rounded(asdict(each)) for name, each in self.objectives.items()}
        return {"networks": self.networks, "ceiling": round(self.ceiling, 4), "objectives": plain}


def calibrated(quest: Quest, surface: Surface, worth: Worth) -> Calibration:
    """Train networks that fill the target's surface, and compare what each objective says of them."""
    seed = quest.plan.seed
    points = ModelSampler(surface.names, seed)
    widths = [
        project(points.point(number), surface.cost, surface.allowed, surface.targets)
        for number in range(quest.calibrate)
    ]

    def trained(share: float, seed: int) -> Sequence[float]:
        networks = [(each, seed) for each in widths]
        found = worth.trained(networks, CALIBRATION, f"{round(100 * share)}-{seed}", share)
        return [float("nan") if each.value is None else each.value for each in found]

    objectives = {name: [value(each, 0) for each in widths] for name, value in worth.direct.items()}
    objectives["short"] = list(trained(quest.short, seed))
    return Calibration.of(objectives, [trained(1.0, seed), trained(1.0, seed + 1)], seed)


def _ranks(values: Floats, trainings: Floats) -> tuple[float, float]:
    """Return the mean Spearman and Kendall correlations of values with each training; NaN if one is flat."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        spearman = [float(spearmanr(values, each).statistic) for each in trainings]
        kendall = [float(kendalltau(values, each).statistic) for each in trainings]
    return float(np.mean(spearman)), float(np.mean(kendall))


def _interval(drawn: Floats) -> tuple[float, float]:
    """Return the 95 % interval; resamples that hold one network alone have no correlation."""
    known = drawn[np.isfinite(drawn)]
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)


def _rounded(numbers: Mapping[str, float]) -> dict[str, float | None]:
    return {name: None if np.isnan(number) else round(number, 4) for name, number in numbers.items()}
