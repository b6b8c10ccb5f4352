from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from archsearch.errors import UnknownNameError, UsageError
from archsearch.models import resolve
from archsearch.presets import PRESETS
from archsearch.rebuild import Traced, trace_source
from archsearch.recipe import BUDGETS

PUBLISHED: dict[str, dict[str, Any]] = yaml.safe_load(
    (Path(__file__).parent / "data" / "presets.yaml").read_text()
)


@cache
def _traced(model: str) -> Traced:
    # Widths depend on no resolution, so that of the published figures is only needed for CIFAR's networks.
    return trace_source(resolve(model), {}, (3, 64, 64) if "/" in model else (3, 32, 32))


def _published_widths(name: str) -> dict[str, int]:
    facts = PUBLISHED[name]
    pattern = "features.conv{}_{}" if facts["model"].startswith("vgg") else "layer{}.{}.conv1"
    first = 1 if facts["model"].startswith("vgg") else 0
    return {
        pattern.format(stage + 1, number + first): width
        for stage, widths in enumerate(facts["widths"])
        for number, width in enumerate(widths)
    }


def test_every_preset_has_published_widths_to_be_checked_against() -> None:
    assert list(PRESETS) == sorted(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_gives_the_published_widths_and_leaves_everything_else(name: str) -> None:
    preset, expected = PRESETS[name], _published_widths(name)
    assert preset.model == PUBLISHED[name]["model"]
    sizes = _traced(preset.model).graph.sizes
    widths = preset.widths(sizes)
    assert widths.keys() == sizes.keys()
    assert expected.keys() <= widths.keys()
    assert {group: widths[group] for group in expected} == expected
    assert {g for g in widths if widths[g] != sizes[g]} <= expected.keys()


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "macs" in PUBLISHED[name]])
def test_a_preset_costs_what_is_published_and_trains_as_long(name: str) -> None:
    traced, facts = _traced(PRESETS[name].model), PUBLISHED[name]
    cost, reference = traced.cost.of(PRESETS[name].widths(traced.graph.sizes)), traced.cost.reference
    assert (cost.macs, cost.params) == (facts["macs"], facts["params"])
    epochs = BUDGETS["scratch-b"].epochs(160, reference.published_flops, cost.published_flops)
    assert epochs == facts["scratch_b_epochs"]


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "macs_keep" in PUBLISHED[name]])
def test_a_preset_keeps_the_reported_share_of_the_macs(name: str) -> None:
    traced = _traced(PRESETS[name].model)
    cost = traced.cost.of(PRESETS[name].widths(traced.graph.sizes))
    # Reports are rounded, and differ on whether the classifier and the shortcuts count.
    assert cost.macs / traced.cost.reference.macs == pytest.approx(PUBLISHED[name]["macs_keep"], abs=0.008)


@pytest.mark.parametrize("name", ["resnet56-b", "vgg16-a"])
def test_the_small_network_of_a_preset_has_the_published_parameters(name: str) -> None:
    traced = _traced(PRESETS[name].model)
    model, sliced = traced.fresh(PRESETS[name].widths(traced.graph.sizes))
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]["params"]
    assert sliced == ()


def test_a_preset_refuses_another_model_and_names_its_own() -> None:
    with pytest.raises(UsageError, match=re.escape("--preset resnet56-a is for --model resnet56, not vgg16")):
        PRESETS["resnet56-a"].check_model("vgg16")


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean resnet56-b"):
        PRESETS["resnet56b"]
