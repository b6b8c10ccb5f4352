from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import sparse_case as case
import torch
from networks import NETWORKS
from tiny_net import TinyNet

from archsearch.grouping import channel_graph
from archsearch.pruners.soft_filter import zero_weakest
from archsearch.training.callbacks import Callback, State


@pytest.mark.parametrize(
    ("name", "widths", "filters"),
    [
        ("Chain", {"conv1": 5, "conv2": 3}, {"conv1": ["conv1"], "conv2": ["conv2"]}),
        ("Residual", {"stem": 6, "conv1": 1}, {"stem": ["stem", "conv2"], "conv1": ["conv1"]}),
        ("Concat", {"a": 1, "b": 5, "c": 8}, {"a": ["a"], "b": ["b"], "c": ["c"]}),
    ],
)
def test_the_filters_of_smallest_norm_are_zeroed_and_nothing_else(
    name: str, widths: dict[str, int], filters: dict[str, list[str]]
) -> None:
    model = NETWORKS[name].build()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    zero_weakest(model, channel_graph(model, NETWORKS[name].example()), widths)
    after = model.state_dict()
    for group, layers in filters.items():
        weights = [before.pop(f"{layer}.weight").numpy() for layer in layers]
        squares = sum(np.square(w.reshape(len(w), -1)).sum(1) for w in weights)
        weakest = np.argsort(squares)[: len(squares) - widths[group]]
        for layer, weight in zip(layers, weights, strict=True):
            weight[weakest] = 0
            assert np.array_equal(after[f"{layer}.weight"].numpy(), weight)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_filters_are_zero_after_every_epoch_and_may_grow_again_in_the_next() -> None:
    torch.manual_seed(0)
    training, _ = case.sparse_training("soft_filter", TinyNet(3, 2))
    network: Any = training.network
    zeros: list[list[int]] = []

    class Look(Callback):
        def on_step(self, state: State) -> None:
            zeros.append((network.conv1.weight.flatten(1) == 0).all(1).nonzero().flatten().tolist())

    case.run(training, after=(Look(),), epochs=8)
    ends = zeros[5::6]
    assert [len(end) for end in ends] == [3] * 8
    assert not any(zeros[step] for step in range(5))
    assert zeros[6:11] == [[]] * 5  # one step later all have grown
    assert len({tuple(end) for end in ends}) > 1  # not always the same


def test_the_widths_that_it_aims_at_are_part_of_what_the_training_is() -> None:
    torch.manual_seed(0)
    training, _ = case.sparse_training("soft_filter", TinyNet(3, 2))
    assert training.identity == {"widths": {"conv1": 5, "conv2": 12}}
