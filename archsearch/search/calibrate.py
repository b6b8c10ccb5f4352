"""How well each objective ranks networks, measured before a search: whether a search makes sense at all.

A few space-filling networks of the target are trained in full, each with two seeds. An objective's rank
correlation with these trainings says how much of what it tells is true, and that of the two trainings with
each other is what a full training itself reaches: no objective that is trained does much better. One that
knew the true accuracies would reach about the square root of it (Spearman, 1904, correction for attenuation).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import ConstantInputWarning, kendalltau, spearmanr

from archsearch.errors import ArchsearchError
from archsearch.search.work import Work

Floats = npt.NDArray[np.float64]
Network = tuple[Mapping[str, int], int]
"""Widths and a seed."""

RESAMPLES = 500
POLL_S = 0.25
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

    def rows(self) -> list[tuple[str, ...]]:
        """Return the table for people, under ``HEADER``."""
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


def carried_out(work: Work, networks: Sequence[Network]) -> list[float]:
    """Have networks trained, as many at once as there are slots; one that diverged is NaN.

    Args:
        work: Is not closed.
        networks: Are numbered from 0.

    Raises:
        ArchsearchError: If one could not be trained for another reason.
    """
    values: dict[int, float] = {}
    waiting, running = list(range(len(networks))), set[int]()
    while waiting or running:
        while waiting and len(running) < work.slots:
            number = waiting.pop(0)
            running.add(number)
            work.begin(number, *networks[number])
        ended = {number: found for number in running if (found := work.found(number)) is not None}
        for number, found in ended.items():
            running.remove(number)
            if found.reason is not None and found.reason[0] != "diverged":
                raise ArchsearchError(f"network {number}: {found.reason[1]}")
            values[number] = float("nan") if found.value is None else found.value
        if not ended:
            time.sleep(POLL_S)
    return [values[number] for number in range(len(networks))]


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
