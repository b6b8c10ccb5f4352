from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from networks import NETWORKS
from torch import nn

from archsearch.errors import ArchsearchError
from archsearch.grouping import channel_graph
from archsearch.pruners import Context
from archsearch.pruners.calibration import all_filters, contribution_grams, in_total, one_filter_a_place
from archsearch.pruners.reading import Reading, watch

ALL = 10**6
"""More places than there are."""


def context_of(model: nn.Module, *shape: int, images: int = 4) -> Context:
    example = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
    batch = torch.randn(images, *shape, generator=torch.Generator().manual_seed(2))
    halves = [(batch[: images // 2], torch.empty(0)), (batch[images // 2 :], torch.empty(0))]
    return Context(model.eval(), channel_graph(model, example), batches=lambda: halves)


def seeded(build: Callable[[], nn.Module]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


def brute_force(context: Context, layer: nn.Module, unit_of_channel: list[int]) -> Any:
    """Return the Gram matrix of a layer's contributions: outputs with and without each unit's channels."""
    images = torch.cat([images for images, _ in context.calibration()])
    inputs: list[torch.Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        context.model(images)
        hook.remove()
        (x,) = inputs
        layer.double()
        whole = layer(x.double())
        contributions = []
        for unit in range(max(unit_of_channel) + 1):
            without = x.double()
            without[:, [channel for channel, u in enumerate(unit_of_channel) if u == unit]] = 0
            contributions.append((whole - layer(without)).flatten())
        layer.float()
    z = torch.stack(contributions, 1).numpy()
    return z.T @ z


def gram_of(context: Context, group: str, add_up: Any = all_filters, places: int = ALL) -> Any:
    return in_total(contribution_grams(context, ALL, places, add_up)[group])


# --- against computing the next layer without each channel -----------------------------------------------


@pytest.mark.parametrize(
    ("network", "group", "reader", "number", "unit_of_channel"),
    [
        ("Chain", "conv1", "conv2", 1, list(range(8))),
        ("Chain", "conv2", "fc", 2, list(range(12))),
        ("Grouped", "conv1", "conv2", 1, [0, 1] * 4),  # a unit is one channel of each of the 4 groups
        ("Grouped", "conv2", "conv3", 2, [0, 1, 2] * 4),
        ("Concat", "a", "c", 2, [0, 1, 2, 3] + [4] * 6),  # channels of b belong to another group
        ("Concat", "b", "c", 2, [6] * 4 + [0, 1, 2, 3, 4, 5]),
        ("Flattened", "conv1", "fc1", 1, [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4),
        ("Shuffled", "conv1", "conv2", 1, [0, 0, 1, 1, 2, 2, 3, 3]),
        ("InvertedBottleneck", "expand", "squeeze", 2, list(range(8))),
        ("InvertedBottleneck", "expand", "project", 4, list(range(8))),
        ("OneDimensional", "conv1", "conv2", 1, list(range(6))),
        ("OneDimensional", "conv2", "fc", 2, [0] * 8 + [1] * 8 + [2] * 8 + [3] * 8),
    ],
)
def test_contributions_are_what_the_next_layer_computes_with_a_unit_less_what_it_computes_without(
    network: str, group: str, reader: str, number: int, unit_of_channel: list[int]
) -> None:
    context = context_of(NETWORKS[network].build(), *NETWORKS[network].shape[1:])
    gram = contribution_grams(context, ALL, ALL, all_filters)[group][number].matrix
    expected = brute_force(context, context.model.get_submodule(reader), unit_of_channel)
    expected = expected[: len(gram), : len(gram)]
    assert gram == pytest.approx(expected, rel=1e-5, abs=1e-5 * expected.max())
    assert np.diagonal(gram).max() > 0


def test_a_group_that_two_layers_read_adds_up_both() -> None:
    context = context_of(NETWORKS["TwoHeads"].build(), 3, 8, 8)
    expected = sum(brute_force(context, getattr(context.model, head), list(range(6))) for head in ("a", "b1"))
    gram = gram_of(context, "conv")
    assert gram.matrix == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert gram.samples == 4 * (5 + 4)  # images times filters


@pytest.mark.parametrize(
    "reader",
    [
        lambda: nn.Conv2d(8, 6, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2)),
        lambda: nn.Conv2d(8, 6, 3, padding="same", bias=False),
        lambda: nn.Conv2d(8, 6, 3, groups=2, padding=1),
    ],
    ids=["strided", "same", "grouped"],
)
def test_weights_times_patches_are_the_outputs_at_their_places(reader: Callable[[], nn.Module]) -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), reader(), nn.Conv2d(6, 2, 1)))
    check_patches(model, 3, 9, 8)


def test_weights_times_patches_are_the_outputs_in_three_dimensions() -> None:
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv3d(2, 4, 1), nn.Conv3d(4, 3, 3, stride=2, padding=1), nn.Flatten(), nn.LazyLinear(2)
        )
    )
    model(torch.zeros(1, 2, 5, 4, 3))
    check_patches(model, 2, 5, 4, 3)


def test_weights_times_patches_are_the_outputs_of_a_linear_layer_over_tokens() -> None:
    check_patches(NETWORKS["Attention"].build(), 6, 5)


def check_patches(model: nn.Module, *shape: int) -> None:
    context = context_of(model, *shape)
    seen = []

    def see(reading: Reading, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        out = run()
        places = reading.places(30, torch.Generator().manual_seed(0))
        ours = torch.einsum("rgck,gock->rgo", reading.patches(places), reading.weight).flatten(1)
        if reading.bias is not None:
            ours += reading.bias
        torch.testing.assert_close(ours.float(), reading.results(out, places).float())
        seen.append(reading.number)
        return out

    images, _ = next(context.calibration())
    watch(context.model, context.graph, images, see)
    assert len(seen) >= 2


# --- samples ----------------------------------------------------------------------------------------------


def test_one_filter_at_every_place_is_all_filters_where_there_is_one() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Conv2d(5, 1, 3), nn.Flatten()))
    context = context_of(model, 3, 6, 6)
    one = gram_of(context, "0", one_filter_a_place, places=4 * 4)
    every = gram_of(context, "0", all_filters, places=4 * 4)
    assert one.samples == every.samples == 4 * 4 * 4
    assert one.matrix == pytest.approx(every.matrix)


@pytest.mark.parametrize(("network", "group"), [("Chain", "conv1"), ("Chain", "conv2"), ("Grouped", "conv1")])
def test_random_filters_look_like_all_filters_in_the_mean(network: str, group: str) -> None:
    context = context_of(NETWORKS[network].build(), 3, 8, 8)
    some, every = gram_of(context, group, one_filter_a_place, 20_000), gram_of(context, group)
    assert some.samples == 20_000 * 4
    error = some.matrix / some.samples - every.matrix / every.samples
    assert np.abs(error).max() < 0.05 * np.abs(every.matrix / every.samples).max()


def test_no_more_images_are_looked_at_than_wanted() -> None:
    context = context_of(NETWORKS["Chain"].build(), 3, 8, 8)
    assert in_total(contribution_grams(context, 3, 10, one_filter_a_place)["conv1"]).samples == 3 * 10


def test_a_group_that_only_a_transposed_convolution_reads_has_no_contributions() -> None:
    context = context_of(NETWORKS["Transposed"].build(), 3, 8, 8)
    grams = contribution_grams(context, ALL, 10, all_filters)
    assert not grams["conv1"]
    assert len(grams["up"]) == 1


def test_weights_that_several_ops_use_are_not_for_one_of_them_to_change() -> None:
    def show(reading: Reading, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        return run()

    for network, own in (("Chain", 2), ("UsedTwice", 1), ("SharedParameter", 1), ("TiedAutoencoder", 0)):
        context = context_of(NETWORKS[network].build(), *NETWORKS[network].shape[1:])
        images, _ = next(context.calibration())
        assert len(watch(context.model, context.graph, images, show)) == own, network


class Fickle(nn.Module):
    """Takes another way for a single image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.conv(x).mean((2, 3))
        return self.fc(x) if len(x) == 1 else x @ self.fc.weight.t()


def test_a_network_that_computes_otherwise_for_other_batches_is_refused() -> None:
    context = context_of(seeded(Fickle), 3, 4, 4)
    with pytest.raises(ArchsearchError, match=r"runs aten::mm .* take another --method"):
        contribution_grams(context, ALL, 10, all_filters)
