from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from networks import NETWORKS
from torch import nn

from archsearch.architecture import Architecture
from archsearch.errors import SpecError, UsageError
from archsearch.gathers import add_gathers, shared_stream_norms
from archsearch.models import resolve
from archsearch.rebuild import Traced, load, load_weights, trace_module, trace_source
from archsearch.tensor_files import write_tensors
from archsearch.verification import random_selection


def traced(name: str, gathers: Any = True) -> Traced:
    return trace_source(resolve(name), {}, (3, 32, 32), gathers=gathers)


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("preresnet164", 12112),
        ("densenet40", 9360),
    ],  # of all batch norms: Liu et al., ICCV 2017, released code
)
def test_every_batch_norm_can_be_slimmed_as_published(name: str, channels: int) -> None:
    found = traced(name)
    norms = [module for module in found.model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert sum(found.graph.sizes.values()) == channels
    assert len(found.graph.groups) == len(norms)


@pytest.mark.parametrize("name", ["resnet56", "vgg16", "mobilenet_v2", "torchvision/inception_v3"])
def test_norms_that_follow_their_own_convolution_do_not_gather(name: str) -> None:
    source = resolve(name)
    assert source.input_shape is not None
    assert shared_stream_norms(source.build(), torch.randn(1, *source.input_shape)) == []


def test_a_network_without_shared_streams_is_refused() -> None:
    with pytest.raises(UsageError, match="--gather: no batch norm"):
        traced("resnet20")


def test_a_network_that_gathers_everything_is_the_network_itself() -> None:
    model = resolve("preresnet56").build().eval()
    x = torch.randn(2, 3, 32, 32)
    gathering = add_gathers(copy.deepcopy(model), shared_stream_norms(model, x))
    assert torch.equal(gathering(x), model(x))
    assert not any(name.endswith("channels") for name in model.state_dict())


def test_a_selection_reads_the_channels_that_it_says() -> None:
    """By hand: the block reads channels 1 and 4 of the stream, the classifier 0, 2 and 5."""
    model = NETWORKS["Gathering"].build()
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = trace_module(model, NETWORKS["Gathering"].example())
    selection = {"bn1": np.array([1, 4]), "conv1": np.array([0, 3]), "bn": np.array([0, 2, 5])}
    small = found.inherit(selection).eval()
    x = NETWORKS["Gathering"].example()

    def norm(x: torch.Tensor, name: str, kept: list[int]) -> torch.Tensor:
        names = ("running_mean", "running_var", "weight", "bias")
        return F.relu(F.batch_norm(x, *(plain[f"{name}.{each}"][kept] for each in names)))

    stream = F.conv2d(x, plain["stem.weight"], padding=1)
    inner = F.conv2d(norm(stream[:, [1, 4]], "bn1", [1, 4]), plain["conv1.weight"][[0, 3]][:, [1, 4]])
    branch = F.conv2d(norm(inner, "bn2", [0, 3]), plain["conv2.weight"][:, [0, 3]], padding=1)
    read = norm((stream + branch)[:, [0, 2, 5]], "bn", [0, 2, 5]).mean((2, 3))
    expected = F.linear(read, plain["fc.weight"][:, [0, 2, 5]], plain["fc.bias"])
    torch.testing.assert_close(small(x), expected)


@pytest.mark.parametrize("name", ["preresnet56", "densenet40"])
def test_the_file_gives_back_the_same_channels(tmp_path: Path, name: str) -> None:
    found = traced(name)
    selection = random_selection(found.graph, 3, 0.5)
    assert found.verify(selection).ok
    widths = {group: len(kept) for group, kept in selection.items()}
    found.architecture(widths, selection=selection).write(tmp_path / "a.yaml")
    small = found.inherit(selection)
    write_tensors(tmp_path / "a.safetensors", small.state_dict())
    again = load(tmp_path / "a.yaml", tmp_path / "a.safetensors")
    fresh = load(tmp_path / "a.yaml")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(again.eval()(x), small.eval()(x))
    for norm in found.gathers:
        assert torch.equal(fresh.get_buffer(f"{norm}.channels"), torch.from_numpy(selection[norm]))
    cost = found.cost.of(widths)
    assert sum(p.numel() for p in fresh.parameters()) == cost.params
    other = found.architecture(widths, selection=random_selection(found.graph, 4, 0.5))
    assert other.key != Architecture.read(tmp_path / "a.yaml").key


def test_readers_of_given_widths_read_different_parts_of_the_stream() -> None:
    found = traced("preresnet56")
    widths = {name: size // 2 for name, size in found.graph.sizes.items()}
    model, sliced = found.fresh(widths)
    parts = [tuple(model.get_buffer(f"layer1.{block}.bn1.channels").tolist()) for block in range(1, 6)]
    assert sliced == ()
    assert len(set(parts)) == 5
    assert all(len(set(part)) == 32 and list(part) == sorted(part) for part in parts)


def test_weights_of_a_reference_that_does_not_gather_fit_one_that_does(tmp_path: Path) -> None:
    plain = traced("preresnet56", gathers=False).model
    write_tensors(tmp_path / "w.safetensors", plain.state_dict())
    gathering = traced("preresnet56").model
    load_weights(gathering, tmp_path / "w.safetensors")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(gathering.eval()(x), plain.eval()(x))


def test_a_network_that_gathers_can_be_exported() -> None:
    found = traced("preresnet56")
    small = found.inherit(random_selection(found.graph, 0, 0.5)).eval()
    x = torch.randn(2, 3, 32, 32)
    exported = torch.export.export(small, (x,)).module()
    torch.testing.assert_close(exported(x), small(x))


@pytest.mark.parametrize(
    ("gathers", "message"),
    [
        ({"layer1.0.bn1": ["0-3"]}, r"widths\.\S+: (is missing|.* has no such group)"),
        ({"layer1.0.conv1": ["0-3"]}, r"gathers.layer1.0.conv1: the model has no batch norm"),
        ({"layer1.0.bn1": ["3,1"]}, r"gathers.layer1.0.bn1: '1': positions must rise"),
        ({"layer1.0.bn1": ["0-99999999999"]}, r"gathers.layer1.0.bn1: '0-99999999999'"),
        ({"layer1.0.bn1": ["0-65536"]}, r"positions must rise, and stay below 65536"),
        ({"layer1.0.bn1": ["a"]}, r"gathers.layer1.0.bn1: 'a' must be a position"),
        ({"layer1.0.bn1": ["1-"]}, r"gathers.layer1.0.bn1: '1-' must be a position"),
        ({"layer1.0.bn1": [1, 2]}, r"gathers.layer1.0.bn1"),
    ],
)
def test_a_file_that_gathers_what_cannot_be_is_refused(
    tmp_path: Path, gathers: dict[str, Any], message: str
) -> None:
    path = tmp_path / "a.yaml"
    found = traced("preresnet56", gathers=False)
    found.architecture(found.graph.sizes).write(path)
    content = yaml.safe_load(path.read_text())
    del content["key"]
    path.write_text(yaml.safe_dump({**content, "gathers": gathers}))
    with pytest.raises(SpecError, match=message):
        load(path)


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        (["0-6,16"], "reads channel 16, but the stream has 16"),
        (["0-6"], "names 7 channels, but its width is 8"),
    ],
)
def test_channels_that_do_not_fit_the_width_are_refused(
    tmp_path: Path, channels: list[str], message: str
) -> None:
    path = tmp_path / "a.yaml"
    found = traced("preresnet56")
    found.architecture({name: size // 2 for name, size in found.graph.sizes.items()}).write(path)
    content = yaml.safe_load(path.read_text())
    del content["key"]
    content["gathers"]["layer1.0.bn1"] = channels
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(SpecError, match=message):
        load(path)
