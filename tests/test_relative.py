from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from archsearch.compression.relative import distances, places_of
from archsearch.errors import IntegrityError


def test_the_papers_example_needs_one_filler() -> None:
    # Figure 2 of Han et al.: weights at 1, 4 and 15 of 16, in 3 bits: from 4 to 15 it is 11, which exceeds 8.
    found, is_weight = distances(np.array([1, 4, 15]), 16, 3)
    assert (found + 1).tolist() == [2, 3, 8, 3]  # the first counts from before place 0
    assert is_weight.tolist() == [True, True, False, True]
    assert places_of(found, 16, 3).tolist() == [1, 4, 12, 15]


def test_a_distance_of_exactly_the_span_needs_no_filler() -> None:
    assert distances(np.array([7, 15]), 16, 3)[0].tolist() == [7, 7]
    assert distances(np.array([8]), 16, 3)[1].tolist() == [False, True]


def test_zeros_at_the_end_get_fillers_as_well() -> None:
    found, is_weight = distances(np.array([0]), 20, 3)
    assert places_of(found, 20, 3).tolist() == [0, 8, 16]
    assert is_weight.tolist() == [True, False, False]


def one_by_one(places: list[int], size: int, bits: int) -> list[tuple[int, bool]]:
    entries, here = [], -1
    for place in [*places, size]:
        while place - here > 2**bits:
            entries.append((2**bits, False))
            here += 2**bits
        if place < size:
            entries.append((place - here, True))
            here = place
    return entries


@given(st.integers(1, 2000), st.floats(0, 1), st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_places_survive_the_round_trip(size: int, keep: float, bits: int, seed: int) -> None:
    places = np.flatnonzero(np.random.default_rng(seed).random(size) < keep)
    found, is_weight = distances(places, size, bits)
    assert found.max(initial=0) < 2**bits
    assert places_of(found, size, bits)[is_weight].tolist() == places.tolist()
    expected = one_by_one(places.tolist(), size, bits)
    assert [(int(gap) + 1, bool(real)) for gap, real in zip(found, is_weight, strict=True)] == expected


@pytest.mark.parametrize("size", [15, 24, 10**12])
def test_distances_that_end_elsewhere_are_refused(size: int) -> None:
    found, _ = distances(np.array([1, 4, 15]), 16, 3)
    with pytest.raises(IntegrityError, match="the last of 4 entries is at 15"):
        places_of(found, size, 3)
