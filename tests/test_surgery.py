from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import NETWORKS, Chain, Network
from torch import nn

from archsearch.graph import ChannelGraph, Selection
from archsearch.grouping import channel_graph
from archsearch.surgery import kept_slices, mask, shrink
from archsearch.tracing import model_tensors, output_tensors
from archsearch.verification import random_selection

networks = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS.keys())


def traced(network: Network) -> tuple[Any, torch.Tensor, ChannelGraph]:
    model, example = network.build(), network.example()
    return model, example, channel_graph(model, example)


def small_of(model: nn.Module, graph: ChannelGraph, selection: Selection) -> Any:
    """Shrink; tests look at the layers by their names."""
    return shrink(model, graph, selection)


def first(graph: ChannelGraph, **widths: int) -> Selection:
    """Keep the first channels of each group."""
    return {name: np.arange(widths.get(name, size)) for name, size in graph.sizes.items()}


def test_attributes_agree_with_the_tensors() -> None:
    model, _, graph = traced(NETWORKS["InvertedBottleneck"])
    small = small_of(model, graph, first(graph, expand=5, squeeze=3, project=2))
    assert (small.expand.in_channels, small.expand.out_channels) == (3, 5)
    assert small.bn.num_features == 5
    assert (small.depthwise.in_channels, small.depthwise.out_channels, small.depthwise.groups) == (5, 5, 5)
    assert (small.squeeze.in_channels, small.squeeze.out_channels) == (5, 3)
    assert (small.excite.in_channels, small.excite.out_channels) == (3, 5)
    assert (small.project.in_channels, small.project.out_channels) == (5, 2)
    assert (small.fc.in_features, small.fc.out_features) == (2, 5)


def test_attributes_of_grouped_transposed_and_normalising_layers_agree() -> None:
    model, _, graph = traced(NETWORKS["Grouped"])
    small = small_of(model, graph, first(graph, conv1=1, conv2=2))
    assert (small.conv2.in_channels, small.conv2.out_channels, small.conv2.groups) == (4, 8, 4)
    model, _, graph = traced(NETWORKS["TransposedDepthwise"])
    small = small_of(model, graph, first(graph, conv1=4, up=1, grouped=1))
    assert (small.depthwise.in_channels, small.depthwise.out_channels, small.depthwise.groups) == (4, 4, 4)
    assert (small.grouped.in_channels, small.grouped.out_channels, small.grouped.groups) == (2, 2, 2)
    model, _, graph = traced(NETWORKS["GroupNormed"])
    small = small_of(model, graph, first(graph, conv1=1, conv2=5))
    assert (small.norm1.num_groups, small.norm1.num_channels, small.norm2.num_channels) == (4, 4, 5)
    model, _, graph = traced(NETWORKS["LayerNormed"])
    small = small_of(model, graph, first(graph, fc1=7, fc2=3))
    assert (small.norm1.normalized_shape, small.norm2.normalized_shape) == ((7,), (3,))
    model, _, graph = traced(NETWORKS["OneDimensional"])
    assert small_of(model, graph, first(graph, conv1=2)).prelu.num_parameters == 2


@pytest.mark.parametrize("multiplier", [2, 3])
def test_a_depthwise_convolution_with_several_outputs_a_channel_keeps_them(multiplier: int) -> None:
    model: Any = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6 * multiplier, 3, groups=6), nn.Conv2d(6 * multiplier, 4, 1)
    )
    example = torch.randn(1, 3, 4, 4)
    graph = channel_graph(model, example)
    assert graph.sizes == {"0": 6}
    small = small_of(model, graph, {"0": np.array([1, 2, 5])})
    assert (small[1].groups, small[1].in_channels, small[1].out_channels) == (3, 3, 3 * multiplier)
    kept = [unit * multiplier + i for unit in (1, 2, 5) for i in range(multiplier)]
    assert torch.equal(small[1].weight, model[1].weight[kept])
    assert small(example).shape == (1, 4, 2, 2)


@networks
def test_kept_slices_are_the_references(network: Network) -> None:
    model, _, graph = traced(network)
    selection = random_selection(graph, 0)
    kept = graph.kept_units(selection)
    small = small_of(model, graph, selection).state_dict()
    for name, tensor in model_tensors(model).items():
        expected = tensor
        for dim in range(tensor.dim()):
            if (name, dim) in graph.units:
                expected = expected.transpose(0, dim)[kept[graph.units[name, dim]]].transpose(0, dim)
        assert torch.equal(small[name], expected), name


@networks
def test_names_kinds_and_order_of_the_state_are_the_references(network: Network) -> None:
    model, _, graph = traced(network)
    small = small_of(model, graph, random_selection(graph, 0))
    assert list(small.state_dict()) == list(model.state_dict())
    assert [name for name, _ in small.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert [type(module) for module in small.modules()] == [type(module) for module in model.modules()]
    assert all(isinstance(parameter, nn.Parameter) and parameter.is_leaf for parameter in small.parameters())


@networks
def test_the_shrunken_network_shares_no_memory_with_the_reference(network: Network) -> None:
    model, _, graph = traced(network)
    theirs = {tensor.data_ptr() for tensor in model.state_dict().values() if tensor.numel()}
    for small in (small_of(model, graph, first(graph)), mask(model, graph, random_selection(graph, 0))):
        assert not theirs & {tensor.data_ptr() for tensor in small.state_dict().values() if tensor.numel()}


@networks
def test_keeping_everything_changes_nothing(network: Network) -> None:
    model, example, graph = traced(network)
    whole = small_of(model, graph, first(graph))
    assert str(whole) == str(model)
    pairs = zip(output_tensors(whole(example)), output_tensors(model(example)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@networks
def test_a_shrunken_network_trains_copies_and_prints(network: Network) -> None:
    model, example, graph = traced(network)
    small = copy.deepcopy(small_of(model, graph, random_selection(graph, 1))).train()
    outputs = output_tensors(small(torch.cat([example] * 2)))
    torch.stack([output.sum() for output in outputs]).sum().backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None for parameter in small.parameters())
    assert str(small).count("\n") == str(model).count("\n")


def test_masking_zeroes_the_parameters_of_dropped_units_and_no_others() -> None:
    model, _, graph = traced(NETWORKS["Chain"])
    selection = {"conv1": np.array([0, 3]), "conv2": np.arange(12)}
    masked: Any = mask(model, graph, selection)
    gone = [1, 2, 4, 5, 6, 7]
    assert not masked.conv1.weight[gone].any() and not masked.conv2.weight[:, gone].any()
    assert not masked.bn1.weight[gone].any() and not masked.bn1.bias[gone].any()
    assert torch.equal(masked.conv1.weight[[0, 3]], model.conv1.weight[[0, 3]])
    assert torch.equal(masked.fc.weight, model.fc.weight)
    assert torch.equal(masked.bn1.running_var, model.bn1.running_var)


def test_a_parameter_that_two_layers_share_is_still_shared() -> None:
    model, _, graph = traced(NETWORKS["SharedParameter"])
    small = small_of(model, graph, first(graph, stem=4))
    assert small.a.weight is small.b.weight
    assert small.a.weight.shape == (4, 4)


def test_what_a_shared_parameter_keeps_is_told_under_each_of_its_names() -> None:
    model, _, graph = traced(NETWORKS["SharedParameter"])
    kept = kept_slices(model, graph, first(graph, stem=4))
    assert kept.keys() == model.state_dict().keys()
    assert kept["a.weight"] is kept["b.weight"]


def test_frozen_parameters_stay_frozen() -> None:
    model, _, graph = traced(NETWORKS["Chain"])
    model.conv1.weight.requires_grad = False
    small = small_of(model, graph, first(graph, conv1=3))
    assert not small.conv1.weight.requires_grad and small.conv2.weight.requires_grad


def test_a_network_of_the_same_architecture_with_other_weights_is_cut_alike() -> None:
    _, example, graph = traced(NETWORKS["Chain"])
    torch.manual_seed(5)
    other: Any = Chain()
    small = small_of(other, graph, {"conv1": np.array([2, 6]), "conv2": np.array([1])})
    assert torch.equal(small.conv2.weight, other.conv2.weight[[1]][:, [2, 6]])
    assert small(torch.cat([example] * 2)).shape == (2, 10)


def test_a_parametrised_layer_prints_its_new_size() -> None:
    model, example, graph = traced(NETWORKS["WeightNormed"])
    small = small_of(model, graph, first(graph, conv1=5, conv2=3))
    assert (small.conv1.out_channels, small.conv2.in_channels, small.conv2.out_channels) == (5, 5, 3)
    assert small(example).shape == (1, 5)


EXPORTED = ["Chain", "InvertedBottleneck", "Grouped", "Shuffled", "PaddedShortcut", "Attention", "Halves"]


def shrunken(name: str) -> tuple[nn.Module, torch.Tensor]:
    model, example, graph = traced(NETWORKS[name])
    return small_of(model, graph, random_selection(graph, 3)).eval(), example


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTED)
def test_a_shrunken_network_is_exported_by_torch(name: str) -> None:
    small, example = shrunken(name)
    program = torch.export.export(small, (example,))
    torch.testing.assert_close(program.module()(example), small(example))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", EXPORTED)
def test_a_shrunken_network_runs_as_onnx(name: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    small, example = shrunken(name)
    path = tmp_path / "small.onnx"
    torch.onnx.export(small, (example,), str(path), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: example.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), small(example).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["Chain", "Attention"])
def test_a_shrunken_network_is_compiled(name: str) -> None:
    small, example = shrunken(name)
    compiled = torch.compile(small)
    torch.testing.assert_close(compiled(example), small(example), rtol=1e-4, atol=1e-5)
