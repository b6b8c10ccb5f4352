from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from networks import NETWORKS, HardCoded, MeasuredParts, Network, UnequalParts, pooled
from torch import Tensor, nn

import archsearch
from archsearch import rules, verification
from archsearch.cost import CostModel
from archsearch.graph import ChannelGraph, Selection
from archsearch.grouping import channel_graph
from archsearch.rules import Call
from archsearch.surgery import shrink
from archsearch.verification import TOLERANCE, random_selection, randomised, rehearse, verify

networks = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS.keys())


@networks
@pytest.mark.parametrize("keep", [0.5, 0.7])
def test_a_shrunken_network_computes_what_the_masked_reference_does(network: Network, keep: float) -> None:
    model, example = network.build(), network.example()
    graph = channel_graph(model, example)
    for seed in range(4):
        result = verify(model, graph, random_selection(graph, seed, keep), example, seed=seed)
        assert result.ok and result.error < TOLERANCE, result.problem


@networks
def test_one_unit_of_each_group_is_enough(network: Network) -> None:
    model, example = network.build(), network.example()
    graph = channel_graph(model, example)
    assert verify(model, graph, random_selection(graph, 0, 0), example).ok


@networks
def test_a_wrong_slice_is_detected(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small network keeps as many units as it should, but of one group the last ones."""
    model, example = network.build(), network.example()
    graph = channel_graph(model, example)
    for group in graph.sizes:
        if group == "aux1":
            continue  # an auxiliary head has no part in the output in eval mode
        right = {name: np.arange(max(1, 2 * size // 3)) for name, size in graph.sizes.items()}
        wrong = {**right, group: right[group] + graph.sizes[group] - len(right[group])}

        def shrink_wrongly(model: nn.Module, graph: ChannelGraph, _: Selection) -> nn.Module:
            return shrink(model, graph, wrong)  # noqa: B023  used in this turn only

        monkeypatch.setattr(verification, "shrink", shrink_wrongly)
        # In so narrow a network a ReLU may well be zero everywhere: other statistics wake it.
        results = [verify(model, graph, right, example, seed=seed) for seed in range(5)]
        assert sum(result.error > 10 * TOLERANCE for result in results) >= 2, group
        assert all(result.ok == (result.error < TOLERANCE) for result in results)


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Any:
        return self.out(torch.cat([self.a(x), self.b(x)], 1))


def test_a_wrong_rule_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """A concatenation that labels its parts in the wrong order makes networks that run."""

    def backwards(call: Call) -> None:
        right, tensors = rules.cat, call.args[0]
        call.args = (tensors[::-1], *call.args[1:])
        right(call)

    monkeypatch.setattr(rules, "RULES", {**rules.RULES, "aten::cat": backwards})
    model, example = Joined(), torch.randn(1, 3, 4, 4)
    graph = rehearse(model, channel_graph(model, example), example)
    assert graph.sizes == {"a": 4, "b": 4}
    result = verify(model, graph, {"a": np.array([0, 1]), "b": np.array([2, 3])}, example)
    assert not result.ok


def test_a_result_that_is_not_a_number_is_detected_in_any_output(monkeypatch: pytest.MonkeyPatch) -> None:
    network = NETWORKS["TwoHeads"]
    model, example = network.build(), network.example()
    graph = channel_graph(model, example)

    def spoil(model: nn.Module, graph: ChannelGraph, selection: Selection) -> Any:
        small: Any = shrink(model, graph, selection)
        with torch.no_grad():
            small.b2.bias.fill_(float("nan"))
        return small

    monkeypatch.setattr(verification, "shrink", spoil)
    assert not verify(model, graph, random_selection(graph, 0), example).ok


def test_a_network_that_does_not_run_says_what_it_raised() -> None:
    model, example = HardCoded(), torch.randn(1, 3, 8, 8)
    graph = channel_graph(model, example)
    result = verify(model, graph, {"conv1": np.arange(6), "conv2": np.arange(3)}, example)
    assert not result.ok and result.error == float("inf")
    assert result.problem.startswith("does not run: RuntimeError: shape '[-1, 16]'")


def line_of(code: str) -> int:
    """Return the number of the only line in networks.py with this code."""
    lines = (Path(__file__).parent / "networks.py").read_text().splitlines()
    (number,) = [number for number, line in enumerate(lines, 1) if code in line]
    return number


def test_a_hard_coded_view_freezes_its_layer_and_names_the_line() -> None:
    model, example = HardCoded(), torch.randn(1, 3, 8, 8)
    graph = rehearse(model, channel_graph(model, example), example)
    assert graph.sizes == {"conv1": 6}
    (reason,) = [layer.reason for layer in graph.frozen if layer.layer == "conv2"]
    assert reason.startswith(f"the model's code needs its size at networks.py:{line_of('x.view(-1, 16)')}:")
    assert verify(model, graph, {"conv1": np.array([2])}, example).ok


def test_hard_coded_parts_freeze_their_layer_and_measured_parts_do_not() -> None:
    example = torch.randn(1, 3, 4, 4)
    hard = rehearse(UnequalParts(), channel_graph(UnequalParts(), example), example)
    assert hard.sizes == {}
    assert f"networks.py:{line_of('[3, 5], dim=1')}" in hard.frozen[0].reason
    model = MeasuredParts()
    graph = rehearse(model, channel_graph(model, example), example)
    assert graph.sizes == {"conv1": 3, "conv1#2": 5}
    assert verify(model, graph, random_selection(graph, 0), example).ok


class SilentConstant(nn.Module):
    """Sums the first four channels and the others: with fewer it runs, and computes something else."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.conv1(x)
        return self.fc(pooled(x[:, :4] + x[:, 4:8]))


class Compared(nn.Module):
    """Takes another path where it has fewer channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        x = pooled(self.conv1(x))
        return self.fc(x if x.shape[1] == 8 else F.relu(x))


@pytest.mark.parametrize("model", [SilentConstant(), Compared()], ids=["slices", "paths"])
def test_constants_that_raise_nothing_are_found_too(model: nn.Module) -> None:
    example = torch.randn(1, 3, 4, 4)
    graph = channel_graph(model, example)
    assert graph.sizes
    rehearsed = rehearse(model, graph, example)
    assert rehearsed.sizes == {}


@networks
def test_rehearsal_freezes_nothing_where_nothing_is_hard_coded(network: Network) -> None:
    model, example = network.build(), network.example()
    graph = channel_graph(model, example)
    assert rehearse(model, graph, example).sizes == graph.sizes


@pytest.mark.parametrize(
    ("name", "ops"),
    [
        ("LayerNormed", {"aten::native_layer_norm", "aten::mean"}),  # RMSNorm is a mean of squares
        ("GroupNormed", {"aten::native_group_norm"}),
        ("Attention", {"aten::native_layer_norm", "aten::bmm"}),
        ("WeightNormed", {"aten::_weight_norm_interface"}),
        ("Chain", set()),
    ],
)
def test_ops_that_read_all_channels_are_named_and_compared_over_the_kept_ones(
    name: str, ops: set[str]
) -> None:
    model, example = NETWORKS[name].build(), NETWORKS[name].example()
    graph = channel_graph(model, example)
    result = verify(model, graph, random_selection(graph, 0, 0.5), example)
    assert result.ok
    assert set(result.over_kept) == ops


def test_a_layer_norm_over_the_kept_channels_is_torchs_own() -> None:
    """Worked out without the library: normalise the kept features, scale, shift and add them up."""
    model: Any = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    example = torch.randn(3, 4)
    graph = channel_graph(model, example)
    kept = [0, 3, 5]
    hidden = example @ model[0].weight[kept].T + model[0].bias[kept]
    centred = hidden - hidden.mean(1, keepdim=True)
    normal = centred / (centred.pow(2).mean(1, keepdim=True) + 1e-5).sqrt()
    expected = normal @ model[2].weight[:, kept].T + model[2].bias
    torch.testing.assert_close(shrink(model, graph, {"0": np.array(kept)})(example), expected)
    assert verify(model, graph, {"0": np.array(kept)}, example).ok


def test_random_statistics_leave_no_parameter_constant() -> None:
    model: Any = randomised(NETWORKS["Chain"].build(), 0)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.numel() < 2 or tensor.min() < tensor.max(), name
    assert (model.bn1.running_var > 0).all()
    again: Any = randomised(model, 0)
    assert torch.equal(again.bn1.bias, randomised(model, 0).get_parameter("bn1.bias"))


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.5, 1.0])
def test_a_random_selection_keeps_the_share_asked_for(keep: float) -> None:
    graph = channel_graph(NETWORKS["Chain"].build(), NETWORKS["Chain"].example())
    selection = random_selection(graph, 7, keep)
    for name, size in graph.sizes.items():
        assert len(selection[name]) == max(1, round(keep * size))
        assert (np.diff(selection[name]) > 0).all() and selection[name][-1] < size
    again = random_selection(graph, 7, keep)
    assert all(np.array_equal(selection[name], again[name]) for name in selection)


# --- networks that nobody wrote -------------------------------------------------------------------------


class Step(nn.Module):
    """A function of a map and layers."""

    def __init__(self, function: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *self.layers)


def shuffled(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def attended(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    heads = x.view(n, 2, c // 2, h * w).transpose(2, 3)
    weights = (heads @ heads.transpose(2, 3)).softmax(-1)
    return (weights @ heads).transpose(2, 3).reshape(n, c, h, w)


def channels_last(x: Tensor, layer: nn.Module) -> Any:
    return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


STEPS: dict[str, Callable[[int], tuple[Step, int]]] = {
    "convolution": lambda c: (Step(lambda x, conv: F.relu(conv(x)), nn.Conv2d(c, 6, 3, padding=1)), 6),
    "wider": lambda c: (Step(lambda x, conv: conv(x), nn.Conv2d(c, 8, 1)), 8),
    "grouped": lambda c: (Step(lambda x, conv: conv(x), nn.Conv2d(c, c, 3, padding=1, groups=2)), c),
    "depthwise": lambda c: (Step(lambda x, conv: conv(x), nn.Conv2d(c, 2 * c, 1, groups=c)), 2 * c),
    "transposed": lambda c: (Step(lambda x, conv: conv(x), nn.ConvTranspose2d(c, 4, 1)), 4),
    "residual": lambda c: (Step(lambda x, conv: x + conv(x), nn.Conv2d(c, c, 1)), c),
    "dense": lambda c: (Step(lambda x, conv: torch.cat([conv(x), x], 1), nn.Conv2d(c, 4, 1)), c + 4),
    "batch norm": lambda c: (Step(lambda x, norm: norm(x), nn.BatchNorm2d(c)), c),
    "group norm": lambda c: (Step(lambda x, norm: norm(x), nn.GroupNorm(2, c)), c),
    "layer norm": lambda c: (Step(channels_last, nn.LayerNorm(c)), c),
    "linear": lambda c: (Step(channels_last, nn.Linear(c, 6)), 6),
    "excitation": lambda c: (
        Step(
            lambda x, a, b: x * torch.sigmoid(b(a(pooled(x))))[..., None, None],
            nn.Linear(c, 2),
            nn.Linear(2, c),
        ),
        c,
    ),
    "halves": lambda c: (Step(lambda x: torch.mul(*x.chunk(2, 1))), c // 2),
    "twice": lambda c: (Step(lambda x: torch.cat([x, -x], 1)), 2 * c),
    "shuffle": lambda c: (Step(shuffled), c),
    "attention": lambda c: (Step(attended), c),
    "flat": lambda c: (Step(lambda x: x.flatten(1).view(x.shape)), c),
    "to space": lambda c: (Step(lambda x: F.pixel_unshuffle(F.interpolate(x, scale_factor=2), 2)), 4 * c),
}
# Of two channels in two parts, only the number of parts would be left, which their code does hold.
EVEN = {"grouped", "group norm", "halves", "shuffle", "attention"}

CUTS = {"grouped", "group norm", "halves", "shuffle", "attention", "twice", "to space"}


@st.composite
def programs(draw: st.DrawFn) -> list[str]:
    """Steps that fit each other, at most 32 channels wide."""
    channels, found = 6, []
    for _ in range(draw(st.integers(1, 6))):
        possible = [
            name
            for name, step in STEPS.items()
            if (name not in EVEN or channels in range(4, 33, 2)) and 2 <= step(channels)[1] <= 32
        ]
        found.append(draw(st.sampled_from(possible)))
        channels = STEPS[found[-1]](channels)[1]
    return found


def assembled(program: list[str], flat: bool) -> nn.Module:
    torch.manual_seed(0)
    channels, steps = 6, [Step(lambda x, conv: torch.tanh(conv(x)), nn.Conv2d(3, 6, 3))]
    for name in program:
        step, channels = STEPS[name](channels)
        steps.append(step)
    head = nn.Linear(channels * 16 if flat else channels, 5)
    steps.append(Step(lambda x, fc: fc(x.flatten(1) if flat else pooled(x)), head))
    return nn.Sequential(*steps)


@settings(max_examples=80, deadline=None)
@given(programs(), st.booleans(), st.integers(0, 99))
def test_any_network_of_known_structures_shrinks_rightly(program: list[str], flat: bool, seed: int) -> None:
    # In double precision: a norm over two channels that are nearly equal amplifies rounding a lot.
    model, example = assembled(program, flat).double(), torch.randn(1, 3, 6, 6).double()
    graph = channel_graph(model, example)
    assert not graph.unknown_ops
    graph = rehearse(model, graph, example)
    if not graph.groups:
        return
    selection = random_selection(graph, seed)
    result = verify(model, graph, selection, example, seed=seed)
    assert result.ok, result.problem
    small = shrink(model, graph, selection)
    cost = CostModel(model, graph).of({name: len(kept) for name, kept in selection.items()})
    assert cost.params == sum(parameter.numel() for parameter in small.parameters())


@settings(max_examples=40, deadline=None)
@given(programs(), st.booleans())
def test_nothing_is_hard_coded_in_them(program: list[str], flat: bool) -> None:
    # Cut twice in different ways, channels move between blocks, and rehearsal freezes them to be safe.
    assume(sum(name in CUTS for name in program) <= 1)
    model, example = assembled(program, flat), torch.randn(1, 3, 6, 6)
    graph = channel_graph(model, example)
    assert rehearse(model, graph, example).sizes == graph.sizes
    assert not any(re.search("needs its size", layer.reason) for layer in graph.frozen)


class Standardised(nn.Conv2d):
    """A convolution whose weight is standardised over its inputs before use (Brock et al., 2021)."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, padding=1)


def test_a_standardised_weight_is_pruned_and_its_statistics_are_of_the_kept_inputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        Standardised(3, 8, 3), nn.ReLU(), Standardised(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 2)
    )
    example = torch.randn(1, 3, 4, 4)
    graph = rehearse(model, channel_graph(model, example), example)
    assert graph.sizes == {"0": 8, "2": 6}
    found = verify(model, graph, random_selection(graph, 0, 0.5), example)
    assert found.ok, found
    assert found.over_kept == ("aten::native_batch_norm",)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))  # type: ignore[no-any-return]


def test_attention_that_checks_its_sizes_stays_and_the_layers_beside_it_in_one_call_do_not() -> None:
    model, example = Encoder(), torch.randn(1, 5, 16)
    graph = rehearse(model, channel_graph(model, example), example)
    assert graph.sizes == {"encoder.layers.0.linear1": 24, "encoder.layers.1.linear1": 24}
    assert verify(model, graph, random_selection(graph, 0, 0.5), example).ok


def test_the_graph_that_users_ask_for_is_rehearsed() -> None:
    model, example = Encoder(), torch.randn(1, 5, 16)
    assert len(channel_graph(model, example).groups) > 2
    assert list(archsearch.channel_graph(model, example).groups) == [
        "encoder.layers.0.linear1",
        "encoder.layers.1.linear1",
    ]
