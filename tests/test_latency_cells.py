from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from archsearch.latency.cells import DEPTHWISE, Signature, build_cell, input_channels
from archsearch.latency.knots import macs_of
from archsearch.latency.layers import find_layers
from archsearch.rebuild import trace_module
from tests.latency_case import traced
from tests.networks import NETWORKS


@pytest.mark.parametrize("name", ["resnet20", "vgg16", "densenet40", "mobilenet_v2"])
def test_the_cells_have_all_multiply_adds_of_the_network_at_any_widths(name: str) -> None:
    network = traced(name)
    layers = find_layers(network)
    generator = np.random.default_rng(0)
    for _ in range(5):
        widths = {name: int(generator.integers(1, size + 1)) for name, size in network.graph.sizes.items()}
        assert sum(macs_of(layer, widths) for layer in layers) == network.cost.of(widths).macs


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2"])
def test_a_cell_computes_what_its_layer_does_in_shape(name: str) -> None:
    network = traced(name)
    shapes: dict[str, tuple[torch.Size, torch.Size]] = {}
    for layer, module in network.model.named_modules():
        module.register_forward_hook(
            lambda module, inputs, output, layer=layer: shapes.update(
                {layer: (inputs[0].shape, output.shape)}
            )
        )
    network.model.eval()(network.example)
    sizes = network.graph.sizes
    for layer in find_layers(network):
        reads, makes = (
            form.constant + sum(count * sizes[group] for group, count in form.groups.items())
            for form in (layer.reads, layer.makes)
        )
        model, example = build_cell(layer.signature, reads, makes)
        assert example.shape == shapes[layer.name][0]
        made = model(example)
        assert made.shape == shapes[layer.name][1]
        assert made[0, 0].numel() == layer.signature.output_pixels


def test_a_norm_and_an_activation_behind_a_layer_are_part_of_its_cell() -> None:
    network = traced("resnet20")
    first, second = (
        next(layer for layer in find_layers(network) if layer.name == name)
        for name in ("layer1.0.conv1", "layer1.0.conv2")
    )
    assert (first.signature.norm, first.signature.activation) == (True, "relu")
    assert (second.signature.norm, second.signature.activation) == (True, "")  # an addition comes first
    model, _ = build_cell(first.signature, 16, 16)
    assert [type(part) for part in model] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]


def test_a_clipping_that_is_no_relu6_is_not_taken_for_one() -> None:
    def clipped(high: float) -> str:
        network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Hardtanh(0, high), nn.Conv2d(8, 4, 3))
        return find_layers(trace_module(network, torch.randn(1, 3, 8, 8)))[0].signature.activation

    assert clipped(6) == "relu6"
    assert clipped(5) == ""


def test_layers_of_one_signature_share_it() -> None:
    layers = find_layers(traced("resnet20"))
    assert len(layers) == 20
    assert len({layer.signature for layer in layers}) == 9


def test_channels_follow_the_groups() -> None:
    layers = {layer.name: layer for layer in find_layers(traced("resnet20"))}
    assert layers["layer3.1.conv1"].reads.groups == {"conv1": 1}
    assert layers["layer3.1.conv1"].reads.constant == 48  # zeros of the padding shortcuts stay
    assert layers["layer3.1.conv1"].makes.groups == {"layer3.1.conv1": 1}


def test_a_depthwise_layer_reads_one_channel_for_each_that_it_makes() -> None:
    layer = next(
        layer for layer in find_layers(traced("mobilenet_v2")) if layer.signature.groups == DEPTHWISE
    )
    assert (layer.reads.constant, layer.reads.groups) == (1, {})
    model, example = build_cell(layer.signature, 1, 24, batch=2)
    assert model[0].groups == 24
    assert model(example).shape[:2] == (2, 24)


def test_a_cell_behind_itself_runs() -> None:
    signature = Signature(
        kind="conv", size=(8, 8), kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), norm=True
    )
    model, example = build_cell(signature, 16, 16, repeat=3)
    assert sum(isinstance(part, nn.Conv2d) for part in model) == 3
    assert model(example).shape == example.shape


@pytest.mark.parametrize("groups", [1, 4])
def test_transposed_convolutions_are_cells_too(groups: int) -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.ConvTranspose2d(16, 8, 3, stride=2, output_padding=1, groups=groups),
        nn.ReLU(),
        nn.Conv2d(8, 2, 1),
    )
    case = trace_module(network, torch.randn(1, 3, 9, 9))
    layers = find_layers(case)
    assert [layer.signature.kind for layer in layers] == ["conv", "transposed", "conv"]
    signature = layers[1].signature
    model, example = build_cell(signature, 16 // groups, 8)
    assert example.shape[1] == input_channels(signature, 16 // groups, 8) == 16
    assert model(example).shape[2:] == (16, 16)
    assert signature.output_pixels == 256
    assert sum(macs_of(layer, case.graph.sizes) for layer in layers) == case.cost.reference.macs


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_no_structure_breaks_the_search_for_cells(name: str) -> None:
    case = NETWORKS[name]
    network = trace_module(case.build(), case.example())
    layers = find_layers(network)
    assert sum(macs_of(layer, network.graph.sizes) for layer in layers) <= network.cost.reference.macs
    assert all(math.prod(layer.signature.size) > 0 for layer in layers)
