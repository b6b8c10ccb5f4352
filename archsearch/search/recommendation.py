"""What the model of a search recommends so far, kept in the run directory for people who ask meanwhile.

Not a result: the finals decide. The interval is of the model's beliefs alone, and the model is a sum of
curves, which real networks are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from archsearch import files
from archsearch.allocation import Curves
from archsearch.errors import IntegrityError
from archsearch.search.model import AdditiveModel

FILE = "recommendation.json"
DRAWS = 40
INTERVAL = 0.95


@dataclass(frozen=True)
class Recommendation:
    """Widths, and what they are expected to gain over uniform ones in the unit of the values.

    Attributes:
        trials: How many values the model was told.
        widths: By group.
        gain: Posterior mean.
        low: Lower end of the 95 % interval.
        high: Upper end.
        noise: Estimated standard deviation of a trial's value.
    """

    trials: int
    widths: Mapping[str, int]
    gain: float
    low: float
    high: float
    noise: float

    @classmethod
    def of(cls, model: AdditiveModel, uniform: Mapping[str, int], trials: int) -> Recommendation:
        """Ask a model that was told the values of some trials."""
        unit = model.noise / model.hyper.noise  # the model thinks in deviations of the values
        errors = model.errors()
        widths = model.best(errors)
        drawn = [unit * _gain(model.draw(seed), widths, uniform) for seed in range(DRAWS)]
        low, high = np.quantile(drawn, [(1 - INTERVAL) / 2, (1 + INTERVAL) / 2]).tolist()
        gain = unit * _gain(errors, widths, uniform)
        return cls(trials, widths, gain, low, high, model.noise)

    def write(self, run: Path) -> None:
        """Write it into a run directory."""
        files.write_json(run / FILE, asdict(self))

    @classmethod
    def read(cls, run: Path) -> Recommendation | None:
        """Read it from a run directory; ``None`` where there is none yet.

        Raises:
            IntegrityError: If the file is not what ``write`` leaves.
        """
        path = run / FILE
        if not path.exists():
            return None
        found = files.read_json(path, IntegrityError)
        try:
            return cls(**found)
        except TypeError as error:
            raise IntegrityError(f"{path}: is no recommendation of a search: {error}; delete it") from error


def _gain(errors: Curves, widths: Mapping[str, int], uniform: Mapping[str, int]) -> float:
    return float(sum(errors[name][uniform[name]] - errors[name][width] for name, width in widths.items()))
