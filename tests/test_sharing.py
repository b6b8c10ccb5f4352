from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from archsearch.compression.shared import Shared, Stages, sharing_ratio
from archsearch.compression.sharing import k_means, nearest
from archsearch.errors import UsageError


def surviving(count: int, keep: float, seed: int = 0) -> np.ndarray:
    weights = np.random.default_rng(seed).normal(size=count)
    return weights[np.abs(weights) >= np.quantile(np.abs(weights), 1 - keep)]


@pytest.mark.parametrize(
    ("count", "clusters", "keep"), [(500, 7, 1.0), (4000, 31, 1.0), (20_000, 31, 0.1), (20_000, 255, 0.1)]
)
@pytest.mark.parametrize("seed", range(3))
def test_centroids_are_those_of_scikit_learn(count: int, clusters: int, keep: float, seed: int) -> None:
    values = surviving(count, keep, seed)
    start = np.linspace(values.min(), values.max(), clusters)[:, None]
    expected = KMeans(clusters, init=start, n_init=1, tol=0, max_iter=3000, algorithm="lloyd")
    expected.fit(values[:, None])
    centroids = k_means(values, clusters)
    np.testing.assert_allclose(centroids, np.sort(expected.cluster_centers_[:, 0]), atol=1e-9)
    inertia = ((values - centroids[nearest(values, centroids)]) ** 2).sum()
    assert inertia == pytest.approx(expected.inertia_)


def test_the_start_is_spread_evenly_between_the_least_and_the_largest() -> None:
    values = surviving(1000, 1.0)
    start = np.linspace(values.min(), values.max(), 8)
    assert k_means(values, 8, max_steps=0).tolist() == start.tolist()


def test_clusters_around_zero_that_nothing_survives_in_are_used_elsewhere() -> None:
    values = surviving(20_000, 0.05)
    start = k_means(values, 31, max_steps=0)
    assert len(np.unique(nearest(values, start))) < 25
    assert len(np.unique(nearest(values, k_means(values, 31)))) == 31


def test_few_different_weights_are_kept_exactly() -> None:
    assert k_means(np.array([3.0, 1.0, 3.0, -2.0]), 31).tolist() == [-2, 1, 3]


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=80), st.integers(1, 9))
def test_each_weight_gets_its_nearest_centroid(values: list[float], clusters: int) -> None:
    weights = np.array(values)
    centroids = k_means(weights, clusters)
    assert len(centroids) <= clusters
    assert (np.diff(centroids) >= 0).all()
    distances = np.abs(weights[:, None] - centroids[None])
    chosen = distances[np.arange(len(weights)), nearest(weights, centroids)]
    np.testing.assert_allclose(chosen, distances.min(axis=1), atol=1e-12)


def layer(keep: float = 0.3, shape: tuple[int, ...] = (40, 50)) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return weight, weight.abs() >= weight.abs().flatten().quantile(1 - keep)


def test_shared_weights_are_the_nearest_values_where_the_mask_is_and_zero_elsewhere() -> None:
    weight, mask = layer()
    shared = Shared.share(weight, mask, 5, 5)
    dense = shared.dense()
    assert dense.shape == weight.shape
    assert (dense[~mask] == 0).all()
    assert len(dense[mask].unique()) == 31
    values = torch.from_numpy(shared.centroids)
    nearest_error = (weight[mask][:, None] - values[None]).abs().min(1).values
    assert torch.allclose((weight - dense)[mask].abs(), nearest_error, atol=1e-7)
    assert torch.equal(shared.table()[shared.code_map()], dense)


def test_a_surviving_weight_of_zero_survives() -> None:
    shared = Shared.share(torch.tensor([0.0, 5.0, 0.0]), torch.tensor([True, True, False]), 5, 5)
    assert shared.codes.tolist() == [1, 2]
    assert shared.centroids.tolist() == [0, 5]


def test_only_float32_is_shared_and_bits_are_bounded() -> None:
    weight, mask = layer()
    with pytest.raises(UsageError, match="float32"):
        Shared.share(weight.half(), mask, 5, 5)
    with pytest.raises(UsageError, match="index bits: must be from 1 to 8, not 9"):
        Shared.share(weight, mask, 5, 9)


def test_the_ratio_of_the_papers_example_is_3_2() -> None:
    # Section 3 of Han et al.: 16 weights of 32 bits as 4 values: 16 * 32 / (4 * 32 + 2 * 16) = 3.2.
    assert sharing_ratio(16, 4) == pytest.approx(3.2)


def test_the_bits_of_each_stage_are_those_of_the_paper() -> None:
    weight, mask = layer(keep=0.05)
    shared = Shared.share(weight, mask, 5, 3)
    survivors, stages = int(mask.sum()), shared.stage_bits()
    assert survivors == 100
    assert stages.original == 2000 * 32
    assert stages.pruned == 100 * 32
    assert stages.shared == 100 * 5 + 32 * 32
    assert stages.pruned / stages.shared == pytest.approx(sharing_ratio(100, 32))
    fillers = sum(math.ceil(gap / 8) - 1 for gap in np.diff(shared.places, prepend=-1))
    fillers += (1999 - int(shared.places[-1])) // 8
    assert fillers > 100
    assert stages.indexed == (100 + fillers) * (5 + 3) + 32 * 32
    coded = shared.coded
    payload = [coded.codes, coded.gaps, coded.code_words.tobytes(), coded.gap_words.tobytes()]
    assert stages.coded == 8 * (4 * 31 + sum(map(len, payload)))


def test_bits_add_up_over_layers() -> None:
    assert Stages(1, 2, 3, 4, 5) + Stages(10, 20, 30, 40, 50) == Stages(11, 22, 33, 44, 55)
