from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from torch import nn

from archsearch.errors import UnknownNameError, UsageError
from archsearch.models import resolve
from archsearch.presets import PRESETS
from archsearch.presets.preset import listed
from archsearch.rebuild import Traced, trace_source
from archsearch.recipe import BUDGETS

PUBLISHED: dict[str, dict[str, Any]] = yaml.safe_load(
    (Path(__file__).parent / "data" / "presets.yaml").read_text()
)
EPOCHS = [name for name in PUBLISHED if "scratch_b_epochs" in PUBLISHED[name]]
IMAGENET_CAP = 2  # 180 of 90 epochs


@cache
def _traced(model: str) -> Traced:
    # All presets of a model have one input shape.
    presets = [facts for facts in PUBLISHED.values() if facts["model"] == model]
    traced = trace_source(resolve(model), {}, presets[0]["input_shape"])
    vanishing = any(0 in row for facts in presets for row in facts["widths"])
    return traced.with_branches() if vanishing else traced


def _published_widths(name: str) -> dict[str, int]:
    facts = PUBLISHED[name]
    groups = [group for group in _traced(facts["model"]).graph.sizes if re.fullmatch(facts["groups"], group)]
    return dict(zip(groups, chain.from_iterable(facts["widths"]), strict=True))


def test_every_preset_has_published_widths_to_be_checked_against() -> None:
    assert list(PRESETS) == sorted(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_gives_the_published_widths_and_leaves_everything_else(name: str) -> None:
    preset, expected = PRESETS[name], _published_widths(name)
    assert preset.model == PUBLISHED[name]["model"]
    sizes = _traced(preset.model).graph.sizes
    widths = preset.widths(sizes)
    assert widths == {**sizes, **expected}
    assert widths != sizes
    assert all(widths[group] <= size for group, size in sizes.items())


# ------------------------------------------------------------------- costs, counted layer by layer by hand


class Count:
    """Multiply-adds and parameters of a network that is written down layer by layer."""

    def __init__(self) -> None:
        self.macs = self.params = 0

    def conv(
        self,
        reads: int,
        makes: int,
        kernel: int,
        size: int,
        *,
        bias: bool = False,
        norm: bool = True,
        groups: int = 1,
    ) -> int:
        """Add a convolution with ``size`` x ``size`` outputs and its norm; return what it makes."""
        weights = kernel * kernel * reads // groups * makes
        self.macs += weights * size * size
        self.params += weights + bias * makes + norm * 2 * makes
        return makes

    def linear(self, reads: int, makes: int, *, norm: bool = False) -> int:
        self.macs += reads * makes
        self.params += reads * makes + makes + norm * 2 * makes
        return makes


def _vgg(count: Count, stages: Sequence[Sequence[int]], size: int, *, bias: bool, norm: bool) -> int:
    channels = 3
    for stage, layers in enumerate(stages):
        for makes in layers:
            channels = count.conv(channels, makes, 3, size >> stage, bias=bias, norm=norm)
    return channels


def _zoo_vgg16(count: Count, stages: Sequence[Sequence[int]]) -> None:
    channels = _vgg(count, stages, 32, bias=False, norm=True)
    count.linear(count.linear(channels, 512, norm=True), 10)


def _zoo_vgg19(count: Count, stages: Sequence[Sequence[int]]) -> None:
    count.linear(_vgg(count, stages, 32, bias=False, norm=True), 10)


def _torchvision_vgg16(count: Count, stages: Sequence[Sequence[int]]) -> None:
    channels = _vgg(count, stages, 224, bias=True, norm=False)
    count.linear(count.linear(count.linear(channels * 7 * 7, 4096), 4096), 1000)


def _zoo_resnet(count: Count, stages: Sequence[Sequence[int]]) -> None:
    """Stages are the inner widths of the blocks; shortcuts pad with zeros and cost nothing."""
    channels = count.conv(3, 16, 3, 32)
    for stage, inner in enumerate(stages):
        for width in inner:
            count.conv(channels, width, 3, 32 >> stage)
            channels = count.conv(width, 16 << stage, 3, 32 >> stage)
    count.linear(channels, 10)


def _resnet34(count: Count, stages: Sequence[Sequence[int]]) -> None:
    channels = count.conv(3, 64, 7, 112)
    for stage, inner in enumerate(stages):
        size, out = 56 >> stage, 64 << stage
        if channels != out:
            count.conv(channels, out, 1, size)
        for width in inner:
            count.conv(channels, width, 3, size)
            channels = count.conv(width, out, 3, size)
    count.linear(channels, 1000)


def _resnet50(count: Count, stages: Sequence[Sequence[int]]) -> None:
    """Stages are the inner widths of the bottlenecks, two each; the 3x3 convolution has the stride.

    Of a block of width 0 the shortcut is left.
    """
    channels = count.conv(3, 64, 7, 112)
    for stage, inner in enumerate(stages):
        size, out, before = 56 >> stage, 256 << stage, 56 >> max(stage - 1, 0)
        count.conv(channels, out, 1, size)
        for block, (first, second) in enumerate(zip(inner[::2], inner[1::2], strict=True)):
            if first:
                count.conv(channels, first, 1, before if block == 0 else size)
                count.conv(first, second, 3, size)
                count.conv(second, out, 1, size)
            channels = out
    count.linear(channels, 1000)


def _mobilenet_v1(count: Count, stages: Sequence[Sequence[int]]) -> None:
    (first, *rest) = stages[0]
    channels, size = count.conv(3, first, 3, 32), 32
    for number, width in enumerate(rest):
        size //= 2 if number in (1, 3, 5, 11) else 1
        count.conv(channels, channels, 3, size, groups=channels)
        channels = count.conv(channels, width, 1, size)
    count.linear(channels, 10)


BY_HAND: Mapping[str, Callable[[Count, Sequence[Sequence[int]]], None]] = {
    "vgg16": _zoo_vgg16,
    "vgg19": _zoo_vgg19,
    "resnet56": _zoo_resnet,
    "resnet110": _zoo_resnet,
    "mobilenet_v1": _mobilenet_v1,
    "torchvision/resnet34": _resnet34,
    "torchvision/resnet50": _resnet50,
    "torchvision/vgg16": _torchvision_vgg16,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_costs_what_a_count_by_hand_gives(name: str) -> None:
    traced, facts, count = _traced(PRESETS[name].model), PUBLISHED[name], Count()
    BY_HAND[facts["model"]](count, facts["widths"])
    cost = traced.cost.of(PRESETS[name].widths(traced.graph.sizes))
    assert (cost.macs, cost.params) == (count.macs, count.params)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "macs" in PUBLISHED[name]])
def test_a_preset_costs_what_is_published(name: str) -> None:
    traced, facts = _traced(PRESETS[name].model), PUBLISHED[name]
    cost, reference = traced.cost.of(PRESETS[name].widths(traced.graph.sizes)), traced.cost.reference
    assert [reference.macs, cost.macs] == facts["macs"]
    assert [reference.params, cost.params] == facts["params"]


@pytest.mark.parametrize("name", EPOCHS)
def test_scratch_b_trains_a_preset_as_long_as_published(name: str) -> None:
    traced, facts = _traced(PRESETS[name].model), PUBLISHED[name]
    cost, reference = traced.cost.of(PRESETS[name].widths(traced.graph.sizes)), traced.cost.reference
    budget = replace(BUDGETS["scratch-b"], cap=IMAGENET_CAP if facts["epochs"] == 90 else None)
    epochs = budget.epochs(facts["epochs"], reference.published_flops, cost.published_flops)
    assert epochs == facts["scratch_b_epochs"]


def test_the_cap_of_imagenet_decides_about_the_presets_that_halve_the_flops_and_no_other() -> None:
    capped = set()
    for name in [name for name in PUBLISHED if PUBLISHED[name]["input_shape"][-1] == 224]:
        traced = _traced(PRESETS[name].model)
        cost, reference = traced.cost.of(PRESETS[name].widths(traced.graph.sizes)), traced.cost.reference
        if reference.published_flops >= IMAGENET_CAP * cost.published_flops:
            capped.add(name)
    assert capped == {"thinet-conv", "thinet-30", "thinet-50", "vgg-5x"}


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "macs_keep" in PUBLISHED[name]])
def test_a_preset_keeps_the_reported_share_of_the_macs(name: str) -> None:
    traced = _traced(PRESETS[name].model)
    cost = traced.cost.of(PRESETS[name].widths(traced.graph.sizes))
    # Reports are rounded, and differ on whether the classifier and the shortcuts count.
    assert cost.macs / traced.cost.reference.macs == pytest.approx(PUBLISHED[name]["macs_keep"], abs=0.008)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "speed_up" in PUBLISHED[name]])
def test_a_uniform_preset_is_as_much_faster_as_reported(name: str) -> None:
    traced = _traced(PRESETS[name].model)
    cost, reference = traced.cost.of(PRESETS[name].widths(traced.graph.sizes)), traced.cost.reference
    if name == "resnet56-uniform-10":  # its report counts more than multiply-adds
        ratio = reference.published_flops / cost.published_flops
        assert ratio == pytest.approx(PUBLISHED[name]["speed_up"], rel=0.02)
    else:
        assert round(reference.macs / cost.macs, 2) == PUBLISHED[name]["speed_up"]


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "depth" in PUBLISHED[name]])
def test_a_preset_of_whole_blocks_has_the_published_depth_and_about_the_published_flops(name: str) -> None:
    traced, facts = _traced(PRESETS[name].model), PUBLISHED[name]
    widths = PRESETS[name].widths(traced.graph.sizes)
    small = traced.inherit({group: np.arange(width) for group, width in widths.items()})
    layers = [
        layer
        for layer, module in small.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and "downsample" not in layer
    ]
    assert len(layers) == facts["depth"]
    cost, reference = traced.cost.of(widths), traced.cost.reference
    ratio = facts["scratch_b_lr_steps"][-1] / 90
    assert reference.published_flops / cost.published_flops == pytest.approx(ratio, rel=0.02)


def test_slimming_keeps_thirty_percent_of_all_channels() -> None:
    sizes = _traced("vgg19").graph.sizes
    assert sum(sizes.values()) == 5504
    assert sum(PRESETS["vgg19-slimming"].widths(sizes).values()) == 5504 * 3 // 10


def test_amc_costs_half_of_mobilenet_on_imagenet_too() -> None:
    # Of 112 x 112 maps behind a stem with stride 2 every layer but the classifier costs (112 / 32)^2 as much.
    traced = _traced("mobilenet_v1")
    widths = PRESETS["mobilenet_v1-amc"].widths(traced.graph.sizes)

    def on_imagenet(macs: int, features: int) -> float:
        return (macs - features * 10) * (112 / 32) ** 2 + features * 1000

    reference = on_imagenet(traced.cost.reference.macs, 1024)
    assert round(reference / 1e6) == 569  # published for the full network
    assert on_imagenet(traced.cost.of(widths).macs, 752) / reference == pytest.approx(0.5, abs=0.02)


# -------------------------------------------------------------------------------------------- use and misuse


@pytest.mark.parametrize("name", ["resnet56-b", "vgg16-a", "vgg19-slimming", "mobilenet_v1-amc"])
def test_the_small_network_of_a_preset_has_the_parameters_that_are_counted(name: str) -> None:
    traced = _traced(PRESETS[name].model)
    widths = PRESETS[name].widths(traced.graph.sizes)
    model, sliced = traced.fresh(widths)
    assert sum(p.numel() for p in model.parameters()) == traced.cost.of(widths).params
    assert sliced == ()


def test_a_preset_refuses_another_model_and_names_its_own() -> None:
    with pytest.raises(UsageError, match=re.escape("--preset resnet56-a is for --model resnet56, not vgg16")):
        PRESETS["resnet56-a"].check_model("vgg16")


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean resnet56-b"):
        PRESETS["resnet56b"]


def test_printed_widths_need_a_layer_each() -> None:
    with pytest.raises(ValueError, match="shorter"):
        listed(("conv1", "conv2"), (3,))
