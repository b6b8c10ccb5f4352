from __future__ import annotations

import numpy as np
import pytest
import torch
from networks import NETWORKS

from archsearch.allocation import ALLOCATIONS, select, solve
from archsearch.cost import CostModel
from archsearch.errors import UsageError
from archsearch.grouping import channel_graph
from archsearch.pruners import Context, Scores
from archsearch.pruners.norm_scale import NormScale
from archsearch.space import Bounds, SearchSpace
from archsearch.targets import Target


def context_of(network: str) -> Context:
    model = NETWORKS[network].build()
    return Context(model, channel_graph(model, NETWORKS[network].example()))


def score(context: Context) -> Scores:
    return NormScale().score(context)


def test_a_channel_is_worth_the_magnitude_of_its_scale() -> None:
    context = context_of("Chain")
    with torch.no_grad():
        context.model.bn1.weight.copy_(torch.tensor([1.0, -2, 3, -4, 5, -6, 7, -8]))
    assert score(context)["conv1"].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_residual_stream_is_worth_the_mean_of_its_norms() -> None:
    context = context_of("Residual")
    with torch.no_grad():
        context.model.bn0.weight.copy_(torch.arange(8.0))
        context.model.bn2.weight.fill_(-4)
    assert score(context)["stem"].tolist() == [(k + 4) / 2 for k in range(8)]


def test_a_norm_over_two_branches_gives_each_its_part() -> None:
    context = context_of("Concat")
    with torch.no_grad():
        context.model.bn.weight.copy_(torch.arange(10.0))
    scores = score(context)
    assert scores["a"].tolist() == [0, 1, 2, 3]
    assert scores["b"].tolist() == [4, 5, 6, 7, 8, 9]
    assert np.isinf(scores["c"]).all()  # no norm follows it


def test_a_unit_of_several_channels_is_worth_their_mean() -> None:
    context = context_of("GroupNormed")
    with torch.no_grad():
        context.model.norm1.weight.copy_(torch.arange(8.0))  # 4 groups of 2; a unit is one of each
    assert score(context)["conv1"].tolist() == [(0 + 2 + 4 + 6) / 4, (1 + 3 + 5 + 7) / 4]


def test_layer_norms_and_root_mean_squares_count() -> None:
    context = context_of("LayerNormed")
    with torch.no_grad():
        context.model.norm1.weight.copy_(torch.arange(12.0))
        context.model.norm2.weight.copy_(-torch.arange(8.0))
    assert score(context)["fc1"].tolist() == list(range(12))
    assert score(context)["fc2"].tolist() == list(range(8))


def test_one_threshold_on_the_scales_cuts_all_groups_and_those_without_a_norm_stay() -> None:
    context = context_of("Chain")
    with torch.no_grad():
        context.model.bn1.weight.copy_(torch.tensor([0.9, 0.8, 0.01, 0.01, 0.7, 0.01, 0.01, 0.01]))
        context.model.bn2.weight.fill_(0.5)
    cost = CostModel(context.model, context.graph)
    priorities = ALLOCATIONS["threshold"](score(context))
    allowed = SearchSpace(Bounds(min_keep=0)).allowed(context.graph)
    wanted = cost.of({"conv1": 3, "conv2": 12}).macs
    widths = solve(cost, priorities, allowed, [Target.parse("flops", str(wanted))])
    assert widths == {"conv1": 3, "conv2": 12}
    assert select(score(context), widths)["conv1"].tolist() == [0, 1, 4]

    context = context_of("Concat")
    cost = CostModel(context.model, context.graph)
    allowed = SearchSpace().allowed(context.graph)
    widths = solve(cost, ALLOCATIONS["threshold"](score(context)), allowed, [Target.parse("flops", "0.6")])
    assert widths["c"] == 8


def test_a_network_without_norms_is_refused() -> None:
    with pytest.raises(UsageError, match="no channel group of this network has a norm"):
        score(context_of("Flattened"))
