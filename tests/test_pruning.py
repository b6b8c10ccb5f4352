from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from find_case import MACS, search

from archsearch.errors import UsageError
from archsearch.pruners import make_pruner, options_of


def test_steps_reach_the_target_over_recovered_networks(tmp_path: Path) -> None:
    said: list[str] = []
    found = search(tmp_path, steps=3, recover=1, say=said.append)
    recoveries = [line.partition(":")[0] for line in said if "recovery" in line]
    assert recoveries == ["l1_norm, recovery 1 of 2", "l1_norm, recovery 2 of 2"]
    assert 0.4 * MACS < found.record.arms[-1].macs <= MACS // 2
    assert found.record.conditions["steps"] == 3
    for name, kept in found.selection.items():
        assert len(set(kept.tolist())) == len(kept) == found.architecture.widths[name].width
        assert kept.max() < found.architecture.widths[name].size


def test_a_step_scores_what_the_step_before_has_left(tmp_path: Path) -> None:
    # Random scores are drawn for the units that are left: had each step scored the full network, the same
    # seed would keep the same units as one step does.
    options: dict[str, Any] = {"method": "random", "budget": "none", "allocation": "local"}
    at_once = search(tmp_path, **options)
    stepwise = search(tmp_path, steps=4, **options)
    assert any(set(at_once.selection[name]) - set(kept) for name, kept in stepwise.selection.items())
    assert any(set(kept) - set(at_once.selection[name]) for name, kept in stepwise.selection.items())


def test_recalibration_changes_statistics_and_no_weight(tmp_path: Path) -> None:
    plain = search(tmp_path, budget="none").model.state_dict()
    fresh = search(tmp_path, budget="none", recalibrate=True).model.state_dict()
    statistics = {name for name in plain if "running" in name}
    assert statistics
    assert all(not torch.equal(plain[name], fresh[name]) for name in statistics)
    counters = {name for name in plain if name.endswith("num_batches_tracked")}
    assert all(torch.equal(plain[name], fresh[name]) for name in plain.keys() - statistics - counters)


def test_a_share_of_all_channels_is_a_target(tmp_path: Path) -> None:
    found = search(tmp_path, flops=None, channels=0.3, method="bn_scale", budget="none")
    kept = sum(group.width for group in found.architecture.widths.values())
    assert kept == int(0.3 * sum(group.size for group in found.architecture.widths.values()))


def test_hyper_parameters_are_read_as_their_types() -> None:
    pruner = make_pruner("thinet", {"images": "20", "ridge": "0.01", "variant": "addition"})
    assert options_of(pruner) == {"images": 20, "places": 10, "variant": "addition", "ridge": 0.01}
    assert make_pruner("thinet") == make_pruner("thinet", {})


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("thinet", {"image": 3}, "option of thinet 'image': did you mean images"),
        ("thinet", {"images": "many"}, "thinet: images is 'many': .*integer"),
        ("thinet", {"variant": "best"}, "thinet: variant"),
        ("l1_norm", {"p": 2}, "option of l1_norm 'p'.*it has none"),
    ],
)
def test_wrong_hyper_parameters_are_refused(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_pruner(method, options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "--steps 0"),
        ({"recover": 0}, "--recover 0"),
        ({"flops": None, "preset": "resnet56-a", "model": None, "steps": 2}, "--steps"),
        ({"data": None, "budget": "none", "steps": 2, "example": None}, "give --data"),
    ],
)
def test_steps_that_cannot_be_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        search(tmp_path, **options)
