from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NETWORKS
from torch import Tensor, nn
from torch.nn import functional as F

from archsearch.errors import UsageError
from archsearch.grouping import channel_graph
from archsearch.pruners import Context, chip
from archsearch.pruners.chip import ChannelIndependence, independence

IMAGES = torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def context_of(model: nn.Module, images: Tensor = IMAGES) -> Context:
    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for part in images.split(4):
            yield part, torch.zeros(len(part), dtype=torch.long)

    return Context(model, channel_graph(model, images[:1]), batches=batches)


def naive(maps: Tensor) -> npt.NDArray[np.float64]:
    """Return the loss of nuclear norm by numpy's singular values, one row after the other."""
    found = []
    for image in maps.detach().double().flatten(2).numpy():
        norms = []
        for row in range(len(image)):
            without = image.copy()
            without[row] = 0
            norms.append(np.linalg.svd(without, compute_uv=False).sum())
        found.append(np.linalg.svd(image, compute_uv=False).sum() - np.array(norms))
    return np.array(found)


def largest(maps: Tensor) -> float:
    """Return the largest singular value."""
    return float(torch.linalg.matrix_norm(maps.double().flatten(2), 2).max())


def assert_as_naive(maps: Tensor) -> None:
    found = independence(maps)
    assert found.shape == maps.shape[:2]
    np.testing.assert_allclose(found.numpy(), naive(maps), rtol=0, atol=2e-7 * largest(maps) + 1e-30)


@settings(deadline=None)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4)),
    st.integers(0, 8),
    st.sampled_from([1e-20, 1e-3, 1.0, 1e10]),
    st.booleans(),
    st.integers(0, 99),
)
def test_scores_are_those_of_singular_values_row_by_row(
    shape: tuple[int, int, int, int], rank: int, scale: float, relu: bool, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    images, channels, height, width = shape
    left = torch.randn(images, channels, rank, generator=draw, dtype=torch.float64)
    maps = (left @ torch.randn(images, rank, height * width, generator=draw, dtype=torch.float64)) * scale
    maps = maps.relu() if relu else maps
    assert_as_naive(maps.reshape(shape))


@pytest.mark.parametrize("shape", [(2, 64, 8, 8), (2, 48, 9, 9), (1, 128, 4, 4), (3, 24, 1, 1)])
def test_scores_are_those_of_singular_values_for_maps_of_real_sizes(shape: tuple[int, int, int, int]) -> None:
    assert_as_naive(torch.randn(shape, generator=torch.Generator().manual_seed(0)).relu())


def test_scores_worked_out_by_hand() -> None:
    # Orthogonal rows lose their lengths; of two equal rows of length 3 either loses (sqrt 2 - 1) 3.
    rows = torch.tensor([[3.0, 0, 0, 0], [0, 4, 0, 0], [0, 0, 0, 0], [3, 0, 0, 0]])
    found = independence(rows.reshape(1, 4, 2, 2))[0]
    assert found.tolist() == pytest.approx([3 * (2**0.5 - 1), 4, 0, 3 * (2**0.5 - 1)], abs=1e-8)
    assert independence(torch.zeros(1, 3, 2, 2)).tolist() == [[0, 0, 0]]


def test_how_many_images_are_taken_at_once_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = torch.randn(7, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    at_once = independence(maps)
    monkeypatch.setattr(chip, "_AT_ONCE", 1)
    torch.testing.assert_close(independence(maps), at_once, rtol=0, atol=1e-12)


def test_units_are_worth_the_mean_over_images_and_maps() -> None:
    model = NETWORKS["Residual"].build()
    scores = ChannelIndependence().score(context_of(model))
    with torch.no_grad():
        stem = F.relu(model.bn0(model.stem(IMAGES)))
        inner = F.relu(model.bn1(model.conv1(stem)))
        summed = F.relu(model.bn2(model.conv2(inner)) + stem)
    np.testing.assert_allclose(scores["conv1"], naive(inner).mean(0), rtol=1e-5)
    np.testing.assert_allclose(scores["stem"], (naive(stem).mean(0) + naive(summed).mean(0)) / 2, rtol=1e-5)
    assert np.ptp(scores["conv1"]) > 0.1


def test_a_copy_of_another_channel_goes_before_channels_of_their_own() -> None:
    model = NETWORKS["Chain"].build()
    with torch.no_grad():
        for tensor in (model.conv2.weight, *model.bn2.state_dict().values()):
            if tensor.dim():
                tensor[5] = tensor[3]
        before = ChannelIndependence().score(context_of(model))["conv2"]
        model.bn2.weight[5] = model.bn2.bias[5] = 0
        alone = ChannelIndependence().score(context_of(model))["conv2"]
    assert before[3] == pytest.approx(before[5], rel=1e-6)
    assert alone[5] == pytest.approx(0, abs=1e-7)
    assert before[3] < alone[3]  # as long as there is a copy, it is worth less


def test_no_more_images_are_looked_at_than_asked_for() -> None:
    model = NETWORKS["Chain"].build()
    some = ChannelIndependence(images=5).score(context_of(model))
    first = ChannelIndependence(images=10).score(context_of(model, IMAGES[:5]))
    np.testing.assert_allclose(some["conv2"], first["conv2"], rtol=1e-6)
    assert some["conv2"].tolist() != ChannelIndependence().score(context_of(model))["conv2"].tolist()


def test_no_images_are_refused() -> None:
    with pytest.raises(UsageError, match="chip: images is 0: it must be 1 or more"):
        ChannelIndependence(images=0)
