"""What the model of a search believes, kept in the run directory: curves with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from archsearch import files
from archsearch.errors import IntegrityError
from archsearch.search.model import AdditiveModel
from archsearch.space import Widths

FILE = "model.json"
DRAWS = 40
INTERVAL = 0.8
"""Share of the draws from the posterior between the low and the high curve."""


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
class Posterior:
    """The beliefs of a model.

    Attributes:
        trials: How many values it was told.
        noise: Estimated standard deviation of a trial's value.
        recommended: The widths that it recommends, by group.
        curves: By group that has a choice.
    """

    trials: int
    noise: float
    recommended: Mapping[str, int]
    curves: Mapping[str, Curve]

    @classmethod
    def of(
        cls,
        model: AdditiveModel,
        allowed: Mapping[str, Widths],
        values: Sequence[float],
        draws: int = DRAWS,
    ) -> Posterior:
        """Ask a model.

        Args:
            model: Has been told the values.
            allowed: The widths that each group may have, rising.
            values: Which it was told.
            draws: From the posterior, for the interval; always the same ones.
        """
        # The model thinks in deviations of the values.
        scale = (float(np.std(values)) or 1.0) if len(values) > 1 else 1.0
        mean, drawn = model.errors(), [model.draw(seed) for seed in range(draws)]
        curves = {}
        for name, steps in allowed.items():
            if len(steps) < 2:
                continue
            utility = scale * (mean[name][steps[0]] - mean[name][steps])
            each = scale * np.stack([error[name][steps[0]] - error[name][steps] for error in drawn])
            low, high = np.quantile(each, [(1 - INTERVAL) / 2, (1 + INTERVAL) / 2], axis=0)
            curves[name] = Curve(steps.tolist(), utility.tolist(), low.tolist(), high.tolist())
        return cls(len(values), model.noise, model.best(mean), curves)

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
            return cls(curves=curves, **found)
        except (AttributeError, KeyError, TypeError) as error:
            raise IntegrityError(
                f"{path}: does not hold what a model believes: {error}; delete it"
            ) from error
