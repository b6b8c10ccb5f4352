from __future__ import annotations

from math import comb

import numpy as np
import pytest

from archsearch.latency.statistics import median, median_interval, percentile, variation


def test_one_disturbed_block_in_ten_does_not_move_the_numbers() -> None:
    calm = [1.0, 1.01, 0.99, 1.0, 1.02, 0.98, 1.0, 1.01, 0.99, 1.0]
    disturbed = [*calm[:-1], 10.0]
    assert median(disturbed) == median(calm) == 1.0
    assert variation(disturbed) == pytest.approx(variation(calm), abs=0.01)


def test_the_variation_of_normal_noise_is_its_deviation_over_its_mean() -> None:
    values = np.random.default_rng(0).normal(50, 1, 20_000)
    assert variation(values) == pytest.approx(1 / 50, rel=0.03)


def test_a_percentile_is_a_value_that_was_measured() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.0
    assert percentile([4.0, 1.0, 3.0, 2.0], 90) == 4.0


@pytest.mark.parametrize(("count", "place"), [(3, 1), (5, 1), (6, 1), (9, 2), (10, 2), (20, 6), (50, 18)])
def test_the_interval_is_the_one_in_tables_of_order_statistics(count: int, place: int) -> None:
    values = list(range(1, count + 1))
    assert median_interval(values[::-1]) == (place, count + 1 - place)

    def held(place: int) -> float:  # by the pair that starts at ``place``, from counting heads
        return 1 - 2 * sum(comb(count, heads) for heads in range(place)) / 2**count

    assert held(place + 1) < 0.95
    assert held(place) >= 0.95 or place == 1


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).exponential(size=(2000, 10))
    held = [low <= np.log(2) <= high for low, high in map(median_interval, draws)]
    assert 0.965 < np.mean(held) < 0.99  # 0.9785 by the binomial
