from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, Functional, Network
from torch import Tensor, nn

from archsearch.construction import Build, build_recorded, build_resized
from archsearch.grouping import channel_graph
from archsearch.surgery import shrink
from archsearch.tracing import output_tensors
from archsearch.verification import random_selection

networks = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS.keys())


def rebuilt(factory: Build, order: list[str | None], small: nn.Module) -> tuple[Any, tuple[str, ...]]:
    """Build with the shapes of another network; tests look at the layers by their names."""
    return build_resized(factory, order, shapes_of(small))


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of parameters and buffers, under each name that they have."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@networks
@pytest.mark.parametrize("seed", range(2))
def test_a_fresh_network_has_the_shapes_and_attributes_of_the_shrunken_one(
    network: Network, seed: int
) -> None:
    model, order = build_recorded(network.factory)
    example = network.example()
    graph = channel_graph(model, example)
    small: Any = shrink(model, graph, random_selection(graph, seed))
    fresh, sliced = rebuilt(network.factory, order, small)
    assert shapes_of(fresh) == shapes_of(small)
    assert str(fresh) == str(small)
    pairs = zip(output_tensors(fresh.eval()(example)), output_tensors(model.eval()(example)), strict=True)
    assert all(a.shape == b.shape for a, b in pairs)
    own = {name for name, _ in model.named_parameters() if isinstance(model, Functional) or "." not in name}
    assert set(sliced) <= own


def test_recording_changes_nothing_of_what_is_built() -> None:
    for network in NETWORKS.values():
        torch.manual_seed(3)
        plain = network.factory().state_dict()
        torch.manual_seed(3)
        recorded, _ = build_recorded(network.factory)
        assert all(torch.equal(tensor, plain[name]) for name, tensor in recorded.state_dict().items())


def test_a_network_resized_to_its_own_size_is_the_one_that_its_factory_makes() -> None:
    for network in NETWORKS.values():
        model, order = build_recorded(network.factory)
        torch.manual_seed(4)
        plain = network.factory().state_dict()
        torch.manual_seed(4)
        resized, sliced = rebuilt(network.factory, order, model)
        assert not sliced
        assert all(torch.equal(tensor, plain[name]) for name, tensor in resized.state_dict().items())


def test_the_global_random_state_decides_the_weights() -> None:
    network = NETWORKS["Chain"]
    model, order = build_recorded(network.factory)
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        weights.append(rebuilt(network.factory, order, model)[0].conv1.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


class Initialised(nn.Module):
    """Four layers, each initialised in another way that looks at its fans."""

    def __init__(self) -> None:
        super().__init__()
        self.default = nn.Conv2d(16, 256, 3)
        self.kaiming = nn.Conv2d(256, 256, 3)
        self.inline = nn.Conv2d(256, 256, 3)
        self.hand = nn.Conv2d(256, 16, 3)
        nn.init.kaiming_normal_(self.kaiming.weight, mode="fan_out", nonlinearity="relu")
        fan_out = self.inline.kernel_size[0] * self.inline.kernel_size[1] * self.inline.out_channels
        self.inline.weight.data.normal_(0, math.sqrt(2.0 / fan_out))
        with torch.no_grad():
            self.hand.weight.copy_(
                torch.randn(self.hand.weight.shape) / math.sqrt(self.hand.weight[0].numel())
            )

    def forward(self, x: Tensor) -> Any:
        for layer in (self.default, self.kaiming, self.inline):
            x = F.relu(layer(x))
        return self.hand(x)


def test_the_spread_of_fresh_weights_follows_the_small_shape_however_it_is_computed() -> None:
    torch.manual_seed(0)
    model, order = build_recorded(Initialised)
    graph = channel_graph(model, torch.randn(1, 16, 9, 9))
    widths = {"default": 32, "kaiming": 64, "inline": 48}
    small: Any = shrink(model, graph, {name: np.arange(width) for name, width in widths.items()})
    fresh, sliced = rebuilt(Initialised, order, small)
    assert not sliced
    expected = {
        "default": 1 / math.sqrt(3 * 9 * 16),  # torch's own: uniform up to 1 / sqrt(fan in)
        "kaiming": math.sqrt(2 / (9 * 64)),  # fan out of the small layer; at full size half of it
        "inline": math.sqrt(2 / (9 * 48)),
        "hand": 1 / math.sqrt(9 * 48),
    }
    for name, std in expected.items():
        weight = getattr(fresh, name).weight
        assert weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * weight.numel())), name


def test_a_fresh_network_is_no_slice_of_the_full_one() -> None:
    network = NETWORKS["Chain"]
    torch.manual_seed(0)
    model, order = build_recorded(network.factory)
    graph = channel_graph(model, network.example())
    small: Any = shrink(model, graph, {"conv1": np.arange(4), "conv2": np.arange(6)})
    torch.manual_seed(0)
    fresh, _ = rebuilt(network.factory, order, small)
    bound = 1 / math.sqrt(9 * 4)  # of conv2, by its own fan in; the full layer's is 1 / sqrt(9 * 8)
    assert 1 / math.sqrt(9 * 8) < fresh.conv2.weight.abs().max() <= bound
    assert not torch.equal(fresh.conv2.weight, small.conv2.weight)


def test_parameters_that_no_layer_makes_are_sliced_and_named() -> None:
    model, order = build_recorded(Functional)
    graph = channel_graph(model, torch.randn(1, 3, 8, 8))
    small: Any = shrink(model, graph, {"kernel": np.array([0, 2])})
    torch.manual_seed(1)
    full = Functional()
    torch.manual_seed(1)
    fresh, sliced = rebuilt(Functional, order, small)
    assert sliced == ("kernel", "scale", "matrix")
    assert torch.equal(fresh.kernel, full.kernel[:2])
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in fresh.parameters())


class Wasteful(nn.Module):
    """Makes layers that it throws away or replaces, and one by position only."""

    def __init__(self) -> None:
        super().__init__()
        nn.Linear(4, 4)
        self.first = nn.Conv2d(3, 5, 1)
        self.first = nn.Conv2d(3, 8, 3, 2, 1, 1, 1, False)
        self.fc = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        return self.fc(F.relu(self.first(x)).mean((2, 3)))


def test_layers_that_are_thrown_away_have_no_name_and_keep_their_size() -> None:
    model, order = build_recorded(Wasteful)
    assert order == [None, None, "first", "fc"]
    graph = channel_graph(model, torch.randn(1, 3, 8, 8))
    small: Any = shrink(model, graph, {"first": np.arange(3)})
    fresh, sliced = rebuilt(Wasteful, order, small)
    assert str(fresh) == str(small) and not sliced


class NarrowConv(nn.Conv2d):
    """A layer of the user's own with another constructor."""

    def __init__(self, width: int) -> None:
        super().__init__(3, out_channels=width, kernel_size=1)


class OwnLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = NarrowConv(8)
        self.norm = nn.BatchNorm2d(8, affine=False)
        self.fc = nn.Linear(in_features=8, out_features=2)

    def forward(self, x: Tensor) -> Any:
        return self.fc(F.relu(self.norm(self.conv(x))).mean((2, 3)))


def test_layers_of_the_users_own_kind_are_resized() -> None:
    model, order = build_recorded(OwnLayer)
    graph = channel_graph(model, torch.randn(1, 3, 8, 8))
    small: Any = shrink(model, graph, {"conv": np.arange(5)})
    fresh, sliced = rebuilt(OwnLayer, order, small)
    assert (fresh.conv.out_channels, fresh.norm.num_features, fresh.fc.in_features) == (5, 5, 5)
    assert str(fresh) == str(small) and not sliced


def test_constructors_are_as_before_also_after_a_factory_that_fails() -> None:
    before = nn.Conv2d.__init__, nn.Linear.__init__, nn.modules.conv._ConvNd.__init__

    def fails() -> nn.Module:
        nn.Linear(2, 2)
        raise RuntimeError("no luck")

    with pytest.raises(RuntimeError, match="no luck"):
        build_recorded(fails)
    assert (nn.Conv2d.__init__, nn.Linear.__init__, nn.modules.conv._ConvNd.__init__) == before
    assert nn.Linear(2, 3).out_features == 3
