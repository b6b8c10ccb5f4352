"""What the model of a search believes, kept in the run directory for people who ask meanwhile.

Not a result: the finals decide. The intervals are of the model's beliefs alone, and the model is a sum of
curves, which real networks are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from archsearch import files
from archsearch.allocation import Curves
from archsearch.errors import IntegrityError
from archsearch.search.model import AdditiveModel, Floats
from archsearch.space import Widths

FILE = "model.json"
DRAWS = 40
CURVES, GAIN = 0.8, 0.95
"""Shares of the draws from the posterior between low and high: of a curve, and of the gain."""


@dataclass(frozen=True)
class Curve:
    """The utility of one group: by how much a width is better than the least one, in the values' unit.

    Attributes:
        widths: Allowed widths, rising.
        mean: Posterior mean at each.
        low: The lower end of the interval at each.
        high: The upper end.
    """

    widths: Sequence[int]
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


@dataclass(frozen=True)
class Gain:
    """By how much the recommended widths are better than uniform ones, in the values' unit.

    Attributes:
        mean: Posterior mean.
        low: Lower end of the 95 % interval.
        high: Upper end.
    """

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Posterior:
    """The beliefs of a model.

    Attributes:
        trials: How many values it was told.
        noise: Estimated standard deviation of a trial's value.
        recommended: The widths that it recommends, by group.
        curves: By group that has a choice.
        gain: Of the recommended widths.
    """

    trials: int
    noise: float
    recommended: Mapping[str, int]
    curves: Mapping[str, Curve]
    gain: Gain

    @classmethod
    def of(
        cls,
        model: AdditiveModel,
        allowed: Mapping[str, Widths],
        uniform: Mapping[str, int],
        trials: int,
        draws: int = DRAWS,
    ) -> Posterior:
        """Ask a model that was told the values of some trials.

        Args:
            model: Of a sum of curves.
            allowed: The widths that each group may have, rising.
            uniform: What a gain is over.
            trials: How many values it was told.
            draws: From the posterior, for the intervals; always the same ones.
        """
        scale = model.noise / model.hyper.noise  # the model thinks in deviations of the values
        mean, drawn = model.errors(), [model.draw(seed) for seed in range(draws)]
        curves = {}
        for name, steps in allowed.items():
            if len(steps) < 2:
                continue
            utility = scale * (mean[name][steps[0]] - mean[name][steps])
            each = scale * np.stack([error[name][steps[0]] - error[name][steps] for error in drawn])
            low, high = _ends(each, CURVES)
            curves[name] = Curve(steps.tolist(), utility.tolist(), low.tolist(), high.tolist())
        best = model.best(mean)
        low, high = _ends(np.array([scale * _gain(error, best, uniform) for error in drawn]), GAIN)
        gain = Gain(scale * _gain(mean, best, uniform), float(low), float(high))
        return cls(trials, model.noise, best, curves, gain)

    def write(self, run: Path) -> Path:
        """Write it into a run directory; return the file."""
        files.write_json(run / FILE, asdict(self))
        return run / FILE

    @classmethod
    def read(cls, run: Path) -> Posterior | None:
        """Read it from a run directory; ``None`` where no model has spoken yet.

        Raises:
            IntegrityError: If the file is not what ``write`` leaves.
        """
        path = run / FILE
        if not path.exists():
            return None
        found = files.read_json(path, IntegrityError)
        try:
            curves = {name: Curve(**curve) for name, curve in found.pop("curves").items()}
            return cls(curves=curves, gain=Gain(**found.pop("gain")), **found)
        except (AttributeError, KeyError, TypeError) as error:
            raise IntegrityError(
                f"{path}: does not hold what a model believes: {error}; delete it"
            ) from error


def _gain(errors: Curves, widths: Mapping[str, int], uniform: Mapping[str, int]) -> float:
    return float(sum(errors[name][uniform[name]] - errors[name][width] for name, width in widths.items()))


def _ends(drawn: Floats, share: float) -> Floats:
    """Return the lower and the upper end of the interval that holds a share of the draws, ``(D, ...)``."""
    ends: Floats = np.quantile(drawn, [(1 - share) / 2, (1 + share) / 2], axis=0)
    return ends
