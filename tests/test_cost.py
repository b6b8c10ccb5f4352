from __future__ import annotations

import copy
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NETWORKS, Network
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from archsearch.cost import CostModel, Polynomial
from archsearch.grouping import channel_graph
from archsearch.models import MODELS, resolve
from archsearch.surgery import shrink
from archsearch.tracing import call_model
from archsearch.verification import random_selection

networks = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS.keys())
PUBLISHED = {
    name: facts
    for name, facts in yaml.safe_load((Path(__file__).parent / "data" / "presets.yaml").read_text()).items()
    if "rule" in facts
}


def cost_of(name: str) -> CostModel:
    model = NETWORKS[name].build()
    return CostModel(model, channel_graph(model, NETWORKS[name].example()))


def torch_macs(model: nn.Module, example: Any) -> int:
    """Return what torch's own counter counts on the meta device: two operations are one multiply-add."""
    on_meta = copy.deepcopy(model).to("meta")
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            call_model(on_meta.eval(), example.to("meta"))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    assert counter.get_total_flops() % 2 == 0
    return int(counter.get_total_flops()) // 2


def params_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@networks
def test_multiply_adds_and_parameters_are_those_worked_out_by_hand(network: Network) -> None:
    model = network.build()
    reference = CostModel(model, channel_graph(model, network.example())).reference
    assert reference.macs == network.macs
    assert reference.params == network.params == params_of(model)


def test_the_cost_of_narrower_layers_worked_out_by_hand() -> None:
    cost = cost_of("Chain").of({"conv1": 5, "conv2": 7})
    assert cost.macs == 64 * 9 * 3 * 5 + 16 * 9 * 5 * 7 + 7 * 10
    assert cost.params == 9 * 3 * 5 + 2 * 5 + 9 * 5 * 7 + 2 * 7 + 7 * 10 + 10


def test_the_cost_of_a_narrower_grouped_convolution_worked_out_by_hand() -> None:
    cost = cost_of("Grouped").of({"conv1": 1, "conv2": 2})  # 4 and 8 channels in 4 groups
    assert cost.macs == 64 * (3 * 4 + 9 * 1 * 8 + 8 * 5)
    assert cost.params == 3 * 4 + 4 + 9 * 1 * 8 + 8 + 8 * 5 + 5


def test_the_cost_of_narrower_attention_worked_out_by_hand() -> None:
    cost = cost_of("Attention").of({"embed": 5, "qkv": 3, "fc1": 7})  # 2 heads of 3 channels
    linear = 5 * 5 + 5 * 18 + 6 * 5 + 5 * 7 + 7 * 5
    assert cost.macs == 6 * linear + 2 * (2 * 6 * 6 * 3) + 5 * 3


def test_the_cost_beside_a_padded_shortcut_worked_out_by_hand() -> None:
    cost = cost_of("PaddedShortcut").of({"stem": 2, "conv1": 5})  # conv2 keeps 2 of 4 and the 4 padded ones
    assert cost.macs == 64 * 9 * 3 * 2 + 16 * 9 * (2 * 5 + 5 * 6) + 6 * 5


def test_published_flops_worked_out_by_hand() -> None:
    """2 a multiply-add, 2 an element of a 2-D batch norm, 1 a ReLU, 1 a bias (Liu et al., released code)."""
    reference = cost_of("Chain").reference
    elements = 64 * 8 + 16 * 12
    assert reference.published_flops == 2 * NETWORKS["Chain"].macs + 2 * elements + elements + 10


def test_published_flops_count_the_window_of_a_pooling() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 2)
    )
    cost = CostModel(model, channel_graph(model, torch.randn(1, 3, 4, 4)))
    # 3 of 4 channels; each of 2 x 2 outputs of the pooling looks at 4.
    assert cost.of({"0": 3}).published_flops == 2 * (16 * 3 * 3 + 12 * 2) + 16 * 3 + 4 * 4 * 3 + 2


def test_the_peak_of_a_chain_worked_out_by_hand() -> None:
    """The first batch norm reads and makes a map of 8 channels; of 2 and 12 it is the second one's maps."""
    cost = cost_of("Chain")
    assert cost.reference.peak_activation_bytes == 4 * (64 * 8 + 64 * 8)
    assert cost.of({"conv1": 2, "conv2": 12}).peak_activation_bytes == 4 * (16 * 12 + 16 * 12)
    assert cost.of({"conv1": 3, "conv2": 12}).peak_activation_bytes == 4 * (64 * 3 + 64 * 3)


def test_the_peak_of_a_residual_block_counts_the_shortcut() -> None:
    """While the second batch norm runs, the shortcut's map waits; adding in place allocates nothing."""
    cost = cost_of("Residual")
    assert cost.reference.peak_activation_bytes == 4 * 64 * (8 + 8 + 8)
    assert cost.of({"stem": 4, "conv1": 6}).peak_activation_bytes == 4 * 64 * (4 + 6 + 6)


def test_the_peak_does_not_count_views() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (2, 3)), nn.Flatten(), nn.Linear(6, 2))
    cost = CostModel(model, channel_graph(model, torch.randn(1, 4)))
    assert cost.reference.peak_activation_bytes == 4 * (6 + 2)


@networks
@pytest.mark.parametrize("seed", range(3))
def test_counts_of_random_widths_are_torchs_own(network: Network, seed: int) -> None:
    model, example = network.build(), network.example()
    graph = channel_graph(model, example)
    selection = random_selection(graph, seed)
    cost = CostModel(model, graph).of({name: len(units) for name, units in selection.items()})
    small = shrink(model, graph, selection)
    assert cost.macs == torch_macs(small, example)
    assert cost.params == params_of(small)


def zoo_case(name: str, seeds: range) -> None:
    source = resolve(name)
    assert source.input_shape is not None
    torch.manual_seed(0)
    model, example = source.build(), torch.randn(1, *source.input_shape)
    graph = channel_graph(model, example)
    assert graph.groups and not graph.unknown_ops
    cost = CostModel(model, graph)
    for seed in seeds:
        selection = random_selection(graph, seed)
        counted = cost.of({group: len(units) for group, units in selection.items()})
        small = shrink(model, graph, selection)
        assert counted.macs == torch_macs(small, example)
        assert counted.params == params_of(small)


@pytest.mark.parametrize("name", ["lenet5", "resnet20", "vgg11"])
def test_counts_of_a_zoo_network_of_random_widths_are_torchs_own(name: str) -> None:
    zoo_case(name, range(1))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(MODELS))
def test_counts_of_every_zoo_network_of_random_widths_are_torchs_own(name: str) -> None:
    zoo_case(name, range(2))


@pytest.mark.parametrize("name", ["Grouped", "Flattened", "PaddedShortcut", "UsedTwice"])
def test_thop_agrees_where_there_are_no_norms(name: str) -> None:
    """It counts convolutions and linear layers by module; poolings are functions here, unseen."""
    thop = pytest.importorskip("thop")
    model, example = NETWORKS[name].build(), NETWORKS[name].example()
    graph = channel_graph(model, example)
    selection = random_selection(graph, 1)
    cost = CostModel(model, graph).of({group: len(units) for group, units in selection.items()})
    small = shrink(model, graph, selection)
    macs, params = thop.profile(copy.deepcopy(small), inputs=(example,), verbose=False)
    assert (cost.macs, cost.params) == (int(macs), int(params))


def published_widths(rule: dict[str, Any], sizes: dict[str, int]) -> dict[str, int]:
    """Follow the published rule, read from the data; independent of the presets of the package."""
    widths = dict(sizes)
    if "halved" in rule:
        convolutions = [name for name in sizes if name.startswith("features.conv")]
        for number in rule["halved"]:
            widths[convolutions[number - 1]] = sizes[convolutions[number - 1]] // 2
        return widths
    number = 1
    for name in sizes:
        block = re.fullmatch(r"layer(\d)\.\d+\.conv1", name)
        if block:
            number += 2
            if number - 1 not in rule["skip"]:
                widths[name] = int(sizes[name] * (1 - rule["p"][int(block[1]) - 1]))
    return widths


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_cost_what_is_published(name: str) -> None:
    facts = PUBLISHED[name]
    model = resolve(facts["model"]).build()
    cost = CostModel(model, channel_graph(model, torch.randn(1, 3, 32, 32)))
    pruned = cost.of(published_widths(facts["rule"], cost.mapping(cost.sizes)))
    assert [cost.reference.macs, pruned.macs] == facts["macs"]
    assert [cost.reference.params, pruned.params] == facts["params"]
    ratio = Fraction(cost.reference.published_flops, pruned.published_flops)
    assert round(float(ratio), 4) == facts["flops_ratio"]
    assert int(facts["epochs"] * ratio) == facts["scratch_b_epochs"]


# --- laws -----------------------------------------------------------------------------------------------


@st.composite
def widths(draw: st.DrawFn, sizes: list[int]) -> list[int]:
    return [draw(st.integers(1, size)) for size in sizes]


@pytest.mark.parametrize("name", ["Attention", "Concat", "GroupNormed", "PaddedShortcut"])
def test_every_cost_rises_with_every_width(name: str) -> None:
    cost = cost_of(name)
    counts: list[Any] = [cost.macs, cost.params, cost.published_flops, cost.peak_activation_bytes]

    @settings(max_examples=30, deadline=None)
    @given(st.data())
    def rises(data: st.DataObject) -> None:
        low = np.array(data.draw(widths(cost.sizes.tolist())))
        high = np.array(
            [data.draw(st.integers(int(w), int(size))) for w, size in zip(low, cost.sizes, strict=True)]
        )
        assert all(int(count(low)) <= int(count(high)) for count in counts)

    rises()


def test_a_batch_of_candidates_costs_what_each_does() -> None:
    cost = cost_of("Attention")
    draw = np.random.default_rng(0)
    batch = draw.integers(1, cost.sizes + 1, (2, 5, len(cost.sizes)))
    for count in (cost.macs, cost.params, cost.published_flops, cost.peak_activation_bytes):
        together = count(batch)
        assert together.shape == (2, 5) and together.dtype == np.int64
        for index in np.ndindex(2, 5):
            assert together[index] == count(batch[index])


def test_the_layers_add_up() -> None:
    cost = cost_of("Residual")
    at = {"stem": 3, "conv1": 4}
    assert cost.macs_by_layer(at) == [64 * 9 * 3 * 3, 64 * 9 * 3 * 4, 64 * 9 * 4 * 3, 3 * 5]
    assert sum(cost.macs_by_layer(at)) == cost.of(at).macs


forms = st.lists(st.integers(0, 9), min_size=4, max_size=4)
terms = st.lists(st.tuples(st.integers(0, 50), st.lists(forms, max_size=4)), max_size=6)


@given(terms, st.lists(st.integers(0, 20), min_size=3, max_size=3))
def test_a_polynomial_is_the_sum_of_its_terms(
    terms: list[tuple[int, list[list[int]]]], at: list[int]
) -> None:
    polynomial = Polynomial.of(
        [(factor, tuple(np.array(form, dtype=float) for form in product)) for factor, product in terms], 3
    )
    expected = 0
    for factor, product in terms:  # in Python's integers
        for form in product:
            factor *= form[0] + sum(a * b for a, b in zip(form[1:], at, strict=True))
        expected += factor
    assert int(polynomial(at)) == expected


def test_a_count_that_float64_cannot_hold_is_refused() -> None:
    polynomial = Polynomial.of([(2**30, (np.array([0.0, 1.0]), np.array([0.0, 1.0])))], 1)
    assert int(polynomial([2**11])) == 2**52
    with pytest.raises(OverflowError):
        polynomial([2**12])


def test_a_network_without_groups_has_the_cost_of_its_reference() -> None:
    model = nn.Linear(3, 4)
    cost = CostModel(model, channel_graph(model, torch.randn(1, 3)))
    assert (cost.reference.macs, cost.reference.params) == (12, 16)


def test_a_recurrent_layer_stays_and_its_macs_count() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(6, 5, batch_first=True)
            self.head = nn.Linear(5, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.lstm(x)[0][:, -1])  # type: ignore[no-any-return]

    model, example = Recurrent(), torch.randn(1, 7, 6)
    graph = channel_graph(model, example)
    # Four gates of 5 read 6 inputs and 5 states in each of 7 steps; the head reads the last state.
    assert int(CostModel(model, graph).macs([])) == 7 * 4 * 5 * (6 + 5) + 2 * 5
    assert not graph.groups
