from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from networks import NETWORKS, Network
from scipy.spatial.distance import pdist, squareform
from torch import nn

from archsearch.grouping import channel_graph
from archsearch.pruners import Context
from archsearch.pruners.fpgm import Fpgm


def test_distances_worked_out_by_hand() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]]))
    scores = Fpgm().score(Context(model, channel_graph(model, torch.randn(1, 2))))
    assert scores["0"] == pytest.approx([5 + 10, 5 + 5, 10 + 5])  # the middle one is the geometric median


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS.keys())
def test_distances_are_scipys_between_all_weights_that_produce_a_unit(network: Network) -> None:
    model = network.build()
    graph = channel_graph(model, network.example())
    scores = Fpgm().score(Context(model, graph))
    tensors = dict(model.named_parameters())
    for name, group in graph.groups.items():
        if not all(member.tensor in tensors for member in group.producers):  # selected, not computed
            assert np.isinf(scores[name]).all()
            continue
        filters = []
        for unit in range(group.first_unit, group.first_unit + group.size):
            slices = [
                tensors[member.tensor].detach().select(member.dim, int(index)).flatten()
                for member in group.producers
                for index in np.flatnonzero(graph.units[member.tensor, member.dim] == unit)
            ]
            filters.append(torch.cat(slices).double().numpy())
        assert scores[name] == pytest.approx(squareform(pdist(np.stack(filters))).sum(1), rel=1e-6)


def test_equal_filters_are_no_distance_apart() -> None:
    model: Any = nn.Sequential(nn.Conv2d(64, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        model[0].weight[:] = 100 * model[0].weight[:1]
    scores = Fpgm().score(Context(model, channel_graph(model, torch.randn(1, 64, 3, 3))))
    assert scores["0"] == pytest.approx([0] * 4, abs=1e-4)
