from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
import torch
from networks import NETWORKS, Concat, HardCoded, MeasuredParts, Network, Tokens, TwoInputs
from torch import nn

from archsearch.graph import STAYS, ChannelGraph
from archsearch.grouping import channel_graph, freeze_groups

networks = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS.keys())


def graph_of(name: str) -> ChannelGraph:
    return channel_graph(NETWORKS[name].build(), NETWORKS[name].example())


@networks
def test_the_groups_are_those_found_by_hand_in_order_of_execution(network: Network) -> None:
    graph = channel_graph(network.build(), network.example())
    assert list(graph.sizes.items()) == list(network.groups.items())
    assert not graph.unknown_ops


@networks
def test_the_layers_whose_channels_stay_are_named(network: Network) -> None:
    graph = channel_graph(network.build(), network.example())
    assert {layer.layer: layer.channels for layer in graph.frozen} == network.frozen
    assert all(layer.reason for layer in graph.frozen)


@networks
def test_units_own_as_many_indices_of_each_member_as_it_says(network: Network) -> None:
    model = network.build()
    graph = channel_graph(model, network.example())
    shapes = {name: tensor.shape for name, tensor in model.state_dict(keep_vars=True).items()}
    claimed = {key: np.full(len(units), STAYS) for key, units in graph.units.items()}
    for group in graph.groups.values():
        assert group.producers and set(group.producers) <= set(group.members)
        for member in group.members:
            units = graph.units[member.tensor, member.dim]
            assert len(units) == shapes[member.tensor][member.dim]
            inside = (units >= group.first_unit) & (units < group.first_unit + group.size)
            counts = np.bincount(units[inside] - group.first_unit, minlength=group.size)
            assert counts.tolist() == [member.count] * group.size
            claimed[member.tensor, member.dim][inside] = units[inside]
    for key, units in graph.units.items():  # members tell all: no unit is anywhere else
        assert units.tolist() == claimed[key].tolist()


def test_units_are_numbered_in_the_order_of_the_first_producers_channels() -> None:
    graph = graph_of("Chain")
    assert graph.units["conv1.weight", 0].tolist() == list(range(8))
    assert graph.units["conv2.weight", 1].tolist() == list(range(8))
    assert graph.units["bn2.running_var", 0].tolist() == list(range(8, 20))
    assert graph.units["fc.weight", 0].tolist() == [STAYS] * 10


def test_a_concatenation_is_read_in_order() -> None:
    graph = graph_of("Concat")
    assert graph.units["c.weight", 1].tolist() == list(range(10))
    assert graph.group_of_unit[:10] == ("a",) * 4 + ("b",) * 6


def test_a_flattened_channel_is_a_run_of_columns() -> None:
    graph = graph_of("Flattened")
    assert graph.units["fc1.weight", 1].tolist() == [unit for unit in range(4) for _ in range(4)]


def test_a_padded_shortcut_ties_the_middle_and_keeps_the_ends() -> None:
    graph = graph_of("PaddedShortcut")
    assert graph.units["conv2.weight", 0].tolist() == [STAYS, STAYS, 0, 1, 2, 3, STAYS, STAYS]


def test_a_shuffle_interleaves_the_halves() -> None:
    graph = graph_of("Shuffled")
    assert graph.units["conv1.weight", 0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert graph.units["conv2.weight", 1].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_unit_of_a_grouped_convolution_is_one_channel_of_each_group() -> None:
    graph = graph_of("Grouped")
    assert graph.units["conv1.weight", 0].tolist() == [0, 1] * 4
    assert graph.units["conv2.weight", 1].tolist() == [0, 1]
    assert graph.groups["conv1"].channels_per_unit == 4
    assert graph.groups["conv2"].channels_per_unit == 4


def test_a_unit_of_attention_is_one_channel_of_each_head_of_queries_keys_and_values() -> None:
    graph = graph_of("Attention")
    group = graph.groups["qkv"]
    units = graph.units["qkv.weight", 0] - group.first_unit
    assert units.tolist() == [0, 1, 2, 3] * 6
    assert graph.units["out.weight", 1].tolist() == graph.units["qkv.weight", 0].tolist()[:8]


def test_unequal_parts_of_one_layer_are_two_groups() -> None:
    graph = channel_graph(MeasuredParts().eval(), torch.randn(1, 3, 4, 4))
    assert graph.sizes == {"conv1": 3, "conv1#2": 5}
    assert [member.tensor for member in graph.groups["conv1#2"].consumers] == ["b.weight"]


def test_layers_that_are_added_are_one_group_whichever_input_they_read() -> None:
    model = TwoInputs().eval()
    graph = channel_graph(model, (torch.randn(1, 3, 4, 4), torch.randn(1, 1, 4, 4)))
    assert graph.sizes == {"left": 6}
    assert [member.tensor for member in graph.groups["left"].producers] == ["left.weight", "right.weight"]


def test_the_columns_of_an_embedding_are_channels_and_its_rows_stay() -> None:
    graph = channel_graph(Tokens(), torch.randint(11, (1, 4)))
    assert graph.sizes == {"table": 6}
    assert graph.units["table.weight", 0].tolist() == [STAYS] * 11
    assert graph.units["position", 2].tolist() == list(range(6))


def test_a_network_of_outputs_only_has_no_groups_and_says_why() -> None:
    graph = channel_graph(nn.Linear(3, 4), torch.randn(1, 3))
    assert graph.sizes == {} and graph.num_units == 0
    assert [(layer.channels, layer.of, layer.reason) for layer in graph.frozen] == [
        (4, 4, "an output of the network")
    ]


def test_a_network_without_parameters_has_no_groups() -> None:
    assert channel_graph(nn.ReLU(), torch.randn(1, 3)).sizes == {}


def test_frozen_groups_are_gone_and_say_why() -> None:
    graph = freeze_groups(channel_graph(Concat(), torch.randn(1, 3, 4, 4)), ["b"], "because")
    assert graph.sizes == {"a": 4, "c": 8}
    assert ("b", 6, "because") in [(layer.layer, layer.channels, layer.reason) for layer in graph.frozen]
    assert graph.units["c.weight", 1].tolist() == [0, 1, 2, 3] + [STAYS] * 6


def test_freezing_every_group_leaves_none() -> None:
    graph = channel_graph(HardCoded(), torch.randn(1, 3, 8, 8))
    assert freeze_groups(graph, list(graph.groups), "because").sizes == {}


def test_kept_units_are_the_selected_ones_and_all_that_stays() -> None:
    graph = graph_of("Concat")
    kept = graph.kept_units({"a": np.array([1]), "b": np.array([0, 5]), "c": np.arange(8)})
    assert np.flatnonzero(kept[:-1]).tolist() == [1, 4, 9, *range(10, 18)]
    assert kept[STAYS]


def test_the_networkx_graph_tells_who_produces_and_who_reads() -> None:
    graph = graph_of("Residual").networkx
    assert set(graph.predecessors("group:stem")) == {"stem", "conv2"}
    assert set(graph.successors("group:stem")) == {"conv1", "fc"}
    assert graph.nodes["group:conv1"] == {"kind": "group", "size": 6}
    assert graph.nodes["conv1"] == {"kind": "layer"}
    assert nx.has_path(graph, "stem", "fc") and not nx.has_path(graph, "fc", "stem")


@networks
def test_every_edge_of_the_networkx_graph_is_between_a_layer_and_a_group(network: Network) -> None:
    graph = channel_graph(network.build(), network.example()).networkx
    kinds = nx.get_node_attributes(graph, "kind")
    assert all({kinds[a], kinds[b]} == {"layer", "group"} for a, b in graph.edges)
