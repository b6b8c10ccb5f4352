from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from networks import NETWORKS
from torch import Tensor, nn
from torch.nn import functional as F

from archsearch.errors import ArchsearchError
from archsearch.grouping import channel_graph
from archsearch.models import resolve
from archsearch.pruners import Context
from archsearch.pruners.hrank import HRank, map_ranks

IMAGES = torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def context_of(model: nn.Module, images: Tensor = IMAGES) -> Context:
    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for part in images.split(4):
            yield part, torch.zeros(len(part), dtype=torch.long)

    return Context(model, channel_graph(model, images[:1]), batches=batches)


def mean_ranks(maps: Tensor) -> list[float]:
    """Return the mean rank of each channel's maps by numpy, one after the other."""
    ranks = [[np.linalg.matrix_rank(picture.numpy()) for picture in image] for image in maps]
    return [float(mean) for mean in np.mean(ranks, axis=0)]


def test_the_maps_of_a_chain_are_those_behind_norm_and_activation() -> None:
    model = NETWORKS["Chain"].build()
    scores = HRank().score(context_of(model))
    with torch.no_grad():
        first = F.relu(model.bn1(model.conv1(IMAGES)))
        second = F.relu(model.bn2(model.conv2(first)))
    assert scores["conv1"].tolist() == pytest.approx(mean_ranks(first))
    assert scores["conv2"].tolist() == pytest.approx(mean_ranks(second))
    assert len(set(scores["conv2"])) > 3


def test_a_residual_stream_is_seen_after_the_stem_and_after_each_sum() -> None:
    model = NETWORKS["Residual"].build()
    scores = HRank().score(context_of(model))
    with torch.no_grad():
        stem = F.relu(model.bn0(model.stem(IMAGES)))
        inner = F.relu(model.bn1(model.conv1(stem)))
        summed = F.relu(model.bn2(model.conv2(inner)) + stem)
    assert scores["conv1"].tolist() == pytest.approx(mean_ranks(inner))
    both = np.mean([mean_ranks(stem), mean_ranks(summed)], axis=0)
    assert scores["stem"].tolist() == pytest.approx(both.tolist())


def test_blocks_of_a_resnet_are_seen_at_the_input_of_their_second_convolution() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = resolve("resnet20").build().eval()
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    scores = HRank().score(context_of(model, images))
    seen: list[Tensor] = []
    block = model.get_submodule("layer2.1")
    hook = block.conv2.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(images)
    hook.remove()
    assert scores["layer2.1.conv1"].tolist() == pytest.approx(mean_ranks(seen[0]))


def test_a_linear_layer_counts_the_images_for_which_it_puts_out_something() -> None:
    model: Any = nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.ReLU(), nn.Linear(5, 2))
    scores = HRank().score(context_of(model))
    with torch.no_grad():
        expected = (model[:3](IMAGES) > 0).double().mean(0)
    assert scores["1"].tolist() == pytest.approx(expected.tolist())


def test_no_more_images_are_looked_at_than_asked_for() -> None:
    model = NETWORKS["Chain"].build()
    some = HRank(images=5).score(context_of(model))
    first = HRank(images=10).score(context_of(model, IMAGES[:5]))
    assert some["conv2"].tolist() == first["conv2"].tolist()
    assert some["conv2"].tolist() != HRank(images=10).score(context_of(model))["conv2"].tolist()


def test_ranks_are_numpys_whatever_the_shape() -> None:
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.randn(3, 4, 7, 2, generator=draw), torch.randn(3, 4, 2, 5, generator=draw))
    maps = left @ right
    maps[0, 0] = 0
    maps[1, 2, 1:] = 0
    assert map_ranks(maps).tolist() == [[0, 2, 2, 2], [2, 2, 1, 2], [2, 2, 2, 2]]
    assert map_ranks(maps).tolist() == np.linalg.matrix_rank(maps.numpy()).tolist()
    assert map_ranks(torch.tensor([[[[0.0, 2.0]], [[0.0, 0.0]]]])).tolist() == [[1, 0]]


def test_a_network_whose_ops_depend_on_the_batch_is_refused() -> None:
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.again = nn.Conv2d(4, 4, 3)
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Any:
            y = F.relu(self.conv(x))
            y = self.again(y) if len(x) == 1 else y
            return self.fc(y.mean((2, 3)))

    with pytest.raises(ArchsearchError, match="ran another op on its example"):
        HRank().score(context_of(Moody().eval()))
