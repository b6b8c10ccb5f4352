from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from archsearch.errors import UnknownNameError
from archsearch.models import resolve
from archsearch.rebuild import Traced, trace_module, trace_source
from archsearch.stages import STAGE_RULES, name_of_stage, resolutions


def _traced(model: str, shape: tuple[int, ...] = (3, 32, 32)) -> Traced:
    source = resolve(model)
    return trace_source(source, source.arguments_for(10, shape[0], shape[-1]), shape)


@pytest.fixture(scope="module")
def vgg16() -> Traced:
    return _traced("vgg16")


@pytest.fixture(scope="module")
def resnet20() -> Traced:
    return _traced("resnet20")


def _groups(traced: Traced, rule: str) -> dict[str, tuple[str, ...]]:
    return {stage.name: stage.groups for stage in STAGE_RULES[rule](traced)}


def _convolutions(stage: int, count: int) -> tuple[str, ...]:
    return tuple(f"features.conv{stage}_{number}" for number in range(1, count + 1))


def test_stages_by_resolution_lie_between_the_poolings(vgg16: Traced) -> None:
    assert _groups(vgg16, "resolution") == {
        "32x32": _convolutions(1, 2),
        "16x16": _convolutions(2, 2),
        "8x8": _convolutions(3, 3),
        "4x4": _convolutions(4, 3),
        "2x2": _convolutions(5, 3),
        "vectors": ("head.0",),
    }


def test_small_images_join_the_stages_whose_pooling_is_left_out() -> None:
    stages = _groups(_traced("vgg16", (1, 8, 8)), "resolution")
    assert list(stages) == ["8x8", "4x4", "2x2", "1x1", "vectors"]
    assert stages["1x1"] == (*_convolutions(4, 3), *_convolutions(5, 3))


def test_a_group_belongs_where_its_first_layer_computes_it(resnet20: Traced) -> None:
    stages = _groups(resnet20, "resolution")
    assert stages["32x32"] == ("conv1", "layer1.0.conv1", "layer1.1.conv1", "layer1.2.conv1")
    assert list(stages) == ["32x32", "16x16", "8x8"]


def test_stages_by_name_follow_the_modules(vgg16: Traced, resnet20: Traced) -> None:
    assert list(_groups(resnet20, "name")) == ["conv1", "layer1", "layer2", "layer3"]
    stages = _groups(vgg16, "name")
    assert list(stages) == [*(f"features.conv{number}" for number in range(1, 6)), "head"]
    assert stages["features.conv3"] == _convolutions(3, 3)


def test_stages_by_layer_are_the_groups(vgg16: Traced) -> None:
    assert _groups(vgg16, "layer") == {name: (name,) for name in vgg16.graph.groups}
    assert {stage.name for stage in STAGE_RULES["layer"](vgg16) if stage.line == "vectors"} == {"head.0"}


@pytest.mark.parametrize(
    ("layer", "stage"),
    [
        ("layer1.0.conv1", "layer1"),
        ("layer1.0.downsample.0", "layer1"),
        ("features.conv3_2", "features.conv3"),
        ("features.10", "features"),
        ("trans1.conv", "trans1.conv"),
        ("conv1", "conv1"),
        ("0", "0"),
    ],
)
def test_a_name_tells_its_stage(layer: str, stage: str) -> None:
    assert name_of_stage(layer) == stage


@pytest.mark.parametrize("rule", list(STAGE_RULES))
@pytest.mark.parametrize("model", ["resnet20", "mobilenet_v2", "lenet_300_100"])
def test_every_group_is_in_one_stage(rule: str, model: str) -> None:
    shape = (1, 28, 28) if model.startswith("lenet") else (3, 32, 32)
    traced = _traced(model, shape)
    groups = [group for stage in STAGE_RULES[rule](traced) for group in stage.groups]
    assert sorted(groups) == sorted(traced.graph.groups)


class Patches(nn.Module):
    """Patches become tokens, and a linear layer widens each; then everything is averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.wide = nn.Linear(8, 16)
        self.narrow = nn.Linear(16, 12)
        self.hidden = nn.Linear(12, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Any:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        tokens = self.narrow(torch.relu(self.wide(tokens)))
        return self.head(torch.relu(self.hidden(tokens.mean(1))))


@pytest.mark.parametrize("batch", [1, 2])
def test_tokens_have_as_many_places_as_there_are_of_them(batch: int) -> None:
    traced = trace_module(Patches(), torch.randn(batch, 3, 8, 12))
    assert resolutions(traced.graph, batch) == {
        "patch": (2, 3),
        "wide": (6,),
        "narrow": (6,),
        "hidden": (),
    }


def test_a_weight_that_is_computed_is_no_map() -> None:
    first = parametrizations.weight_norm(nn.Conv2d(2, 4, 3, padding=1))
    model = nn.Sequential(first, nn.MaxPool2d(2), nn.Conv2d(4, 5, 1), nn.Flatten(), nn.Linear(45, 3))
    traced = trace_module(model, torch.randn(1, 2, 6, 6))
    assert resolutions(traced.graph) == {"0": (6, 6), "2": (3, 3)}


def test_an_unknown_rule_names_the_known() -> None:
    with pytest.raises(UnknownNameError, match="did you mean resolution"):
        STAGE_RULES["resolutions"]
