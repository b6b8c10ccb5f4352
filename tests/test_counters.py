from __future__ import annotations

import pytest
import torch
from find_case import MACS
from networks import NETWORKS
from tiny_net import tiny

from archsearch.cost import CostModel
from archsearch.counters import flop_counter_macs, thop_macs
from archsearch.grouping import channel_graph
from archsearch.rebuild import example_input

EXAMPLE = example_input((2, 6, 6))


@pytest.mark.parametrize("name", NETWORKS)
def test_torchs_flop_counter_agrees_with_the_count_by_hand_and_with_ours(name: str) -> None:
    network = NETWORKS[name]
    model, example = network.build(), network.example()
    assert flop_counter_macs(model, example) == network.macs
    assert CostModel(model, channel_graph(model, example)).reference.macs == network.macs


def test_thop_counts_what_it_counts_and_leaves_nothing_behind() -> None:
    model = tiny().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    # thop adds four for each element of an affine batch norm, which it puts into eval mode.
    assert thop_macs(model, EXAMPLE) == MACS + 4 * (36 * 8 + 9 * 16)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert model.training
    assert not any(module._forward_hooks or "total_ops" in module._buffers for module in model.modules())


def test_the_flop_counter_leaves_the_network_as_it_is() -> None:
    model = tiny().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert flop_counter_macs(model, EXAMPLE) == MACS
    assert model.training
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
