from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import numpy as np
import pytest

from archsearch.errors import ArchsearchError
from archsearch.search.calibrate import Calibration, Correlation
from archsearch.search.work import Direct, Finding
from archsearch.search.worth import carried_out


def kendall(x: list[float], y: list[float]) -> float:
    """Kendall's tau without ties, from its definition."""
    pairs = list(combinations(range(len(x)), 2))
    return float(sum(np.sign(x[i] - x[j]) * np.sign(y[i] - y[j]) for i, j in pairs)) / len(pairs)


def spearman(x: list[float], y: list[float]) -> float:
    """Spearman's rho without ties, by the differences of the ranks."""
    d = np.argsort(np.argsort(x)) - np.argsort(np.argsort(y))
    return float(1 - 6 * (d**2).sum() / (len(x) * (len(x) ** 2 - 1)))


def test_correlations_are_those_of_the_definitions() -> None:
    values, truth = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [10.0, 30.0, 20.0, 50.0, 40.0, 60.0]
    other = [20.0, 10.0, 30.0, 40.0, 60.0, 50.0]
    found = Correlation.of(values, [truth, other], seed=0)
    assert found.spearman == pytest.approx((spearman(values, truth) + spearman(values, other)) / 2)
    assert found.kendall == pytest.approx((kendall(values, truth) + kendall(values, other)) / 2)
    assert found.spearman_low <= found.spearman <= found.spearman_high <= 1


def test_an_objective_that_knows_more_ranks_better_and_the_noise_sets_the_ceiling() -> None:
    generator = np.random.default_rng(1)
    true = generator.normal(size=200)
    trainings = [(true + generator.normal(size=200)).tolist() for _ in range(2)]
    good, bad = true + 0.1 * generator.normal(size=200), generator.normal(size=200)
    found = Calibration.of({"good": good.tolist(), "bad": bad.tolist()}, trainings, seed=0)
    rho = {name: each.spearman for name, each in found.objectives.items()}
    # Half of the trainings' variance is noise: they agree by 0.5, and the truth with them by its root.
    assert rho["full"] == pytest.approx(0.5, abs=0.12)
    assert rho["good"] == pytest.approx(0.5**0.5, abs=0.1)
    assert found.ceiling == pytest.approx(rho["good"], abs=0.1)
    assert abs(rho["bad"]) < 0.2 < found.objectives["good"].spearman_low


def test_networks_without_a_value_are_left_out_and_a_flat_objective_has_no_correlation() -> None:
    trainings = [[1.0, 2.0, float("nan"), 4.0, 5.0], [1.0, 3.0, 2.0, 5.0, 4.0]]
    found = Calibration.of({"flat": [0.0] * 5}, trainings, seed=0)
    assert found.networks == 4
    assert found.facts()["objectives"]["flat"]["spearman"] is None
    assert [row[0] for row in found.rows()] == ["flat", "full"]
    with pytest.raises(ArchsearchError, match="fewer than 3 networks"):
        Calibration.of({}, [[1.0, float("nan"), 2.0], [1.0, 2.0, float("nan")]], seed=0)


def test_networks_are_carried_out_in_their_order_and_one_that_diverged_has_no_value() -> None:
    def value(widths: Mapping[str, int], seed: int) -> float:
        return float(widths["a"] + seed)

    found = carried_out(Direct(value), [({"a": 3}, 1), ({"a": 1}, 0)])
    assert [each.value for each in found] == [4.0, 1.0]

    class Lost(Direct):
        def found(self, number: int) -> Finding | None:
            return Finding(reason=("diverged" if number == 0 else "lost", "why"))

    assert carried_out(Lost(value), [({"a": 3}, 1)])[0].value is None
    with pytest.raises(ArchsearchError, match="finals: network 2, seed 0: why"):
        carried_out(Lost(value), [({"a": 3}, 1), ({"a": 1}, 0)], "finals")
