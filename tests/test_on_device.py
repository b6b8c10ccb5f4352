from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from latency_case import PaperDevice, paper_table, traced

from archsearch import files, on_device
from archsearch.allocation import reference_count
from archsearch.api import find
from archsearch.architecture import Architecture
from archsearch.errors import InfeasibleError, UsageError
from archsearch.latency.library import own_table
from archsearch.latency.meter import Settings
from archsearch.latency.table import LatencyTable
from archsearch.models import resolve
from archsearch.pruning import uniform_widths
from archsearch.rebuild import trace_module
from archsearch.space import Bounds, SearchSpace
from archsearch.targets import Target


def test_widths_meet_the_limit_by_the_upper_end_of_the_prediction() -> None:
    network, space = on_device.aimed(traced(), SearchSpace(), paper_table())
    assert paper_table().quantum == 4
    allowed = space.allowed(network.graph)
    assert all((widths % 4 == 0).all() for widths in allowed.values())
    widths = uniform_widths(network.cost, allowed, [Target.parse("latency", 0.6)])
    _, _, high = paper_table().predict(np.array([widths[name] for name in paper_table().names]))
    assert high <= 0.6 * paper_table().reference_ms
    assert all(width % 4 == 0 for width in widths.values())
    assert reference_count(network.cost, "latency") == round(paper_table().reference_ms * 1e6)


def test_latency_and_flops_hold_together() -> None:
    network, space = on_device.aimed(traced(), SearchSpace(), paper_table())
    targets = [Target.parse("latency", 0.9), Target.parse("flops", 0.3)]
    widths = uniform_widths(network.cost, space.allowed(network.graph), targets)
    assert network.cost.of(widths).macs <= 0.3 * network.cost.reference.macs


def test_the_space_may_ask_for_other_multiples_that_the_table_knows() -> None:
    _, space = on_device.aimed(traced(), SearchSpace(Bounds(round_to=8)), paper_table())
    allowed = space.allowed(traced().graph)
    assert all((widths[:-1] % 8 == 0).all() for widths in allowed.values())


def test_widths_that_the_table_does_not_know_are_refused() -> None:
    _, space = on_device.aimed(
        traced(), SearchSpace(Bounds(min_keep=0.9, max_keep=0.95, round_to=5)), paper_table()
    )
    with pytest.raises(UsageError, match=r"no allowed width of .* is in the latency table"):
        space.allowed(traced().graph)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [("resnet32", (3, 32, 32), "of another network"), ("resnet20", (3, 24, 24), "is for inputs of")],
)
def test_the_table_of_another_network_is_refused(name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        on_device.aimed(traced(name, shape), SearchSpace(), paper_table())


def test_a_network_whose_layers_are_others_is_another_one_though_its_groups_are_alike() -> None:
    more = resolve("resnet20").build(num_classes=1000)
    with pytest.raises(UsageError, match=r"its layer 'fc' has outputs 10, here 1000: profile this one"):
        on_device.aimed(trace_module(more, torch.zeros(1, 3, 32, 32)), SearchSpace(), paper_table())
    coarse = resolve("resnet20").build()
    coarse.conv1.stride = (2, 2)
    with pytest.raises(UsageError, match=r"its layer 'conv1' has stride \(1, 1\), here \(2, 2\)"):
        on_device.aimed(trace_module(coarse, torch.zeros(1, 3, 32, 32)), SearchSpace(), paper_table())


def test_latency_without_a_table_is_refused() -> None:
    network = traced()
    with pytest.raises(UsageError, match=r"--latency: .* give --table"):
        uniform_widths(network.cost, SearchSpace().allowed(network.graph), [Target.parse("latency", 0.5)])


@pytest.mark.parametrize("given", [{"latency": 0.5}, {"table": "t.json", "flops": 0.5}])
def test_a_latency_goes_with_a_table(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--latency goes with --table FILE"):
        find("resnet20", data=None, budget="none", **given)


def test_a_table_and_a_runtime_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        find("resnet20", data=None, budget="none", latency=0.5, table="t.json", runtime="torch")
    with pytest.raises(UsageError, match="--latency goes with"):
        find("resnet20", data=None, budget="none", flops=0.5, runtime="torch")


@pytest.mark.parametrize(
    ("runtime", "message"),
    [
        ({"runtime": "torch", "speed": 3}, "speed: give a name, or fields"),
        ({"batch": 3}, "no name"),
        ({"runtime": "tensorrt"}, "does not run on cpu"),
    ],
)
def test_a_runtime_that_cannot_be_is_refused_before_anything_is_measured(
    runtime: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        on_device.target_device(0.5, None, runtime=runtime, traced=traced(), device="cpu")


def test_the_table_of_this_machine_is_measured_once(tmp_path: Path) -> None:
    device, said = PaperDevice(block=4), list[str]()

    def table(**changes: Any) -> LatencyTable:
        settings = Settings(**{"max_cells": 100, "calibration": 12, "held_out": 10, "round_to": 4, **changes})
        allowed = on_device.allowed_of(traced())
        return own_table(traced(), allowed, settings, tmp_path, meter=device, say=said.append)

    first = table()
    prepared = device.prepared
    assert table().key == first.key
    assert device.prepared == prepared
    assert "there is no table of resnet20" in said[0]
    assert any("takes about" in line for line in said)
    assert table(batch=2).key != first.key
    assert device.prepared > prepared
    assert len(list(tmp_path.glob("resnet20-torch-cpu-b*-float32-*/dev.lat.json"))) == 2
    assert not list(tmp_path.glob("*/*.part"))


@pytest.mark.slow  # a real table, measured
def test_a_runtime_in_place_of_a_table(tmp_path: Path) -> None:
    runtime = {"runtime": "torch", "max_cells": 20, "calibration": 10, "held_out": 10, "blocks": 3}
    given: dict[str, Any] = {
        "latency": 0.9,
        "runtime": runtime,
        "data": None,
        "budget": "none",
        "device": "cpu",
    }
    given |= {"input_shape": (3, 32, 32), "store": tmp_path}
    facts = [find("resnet20", **given).architecture for _ in range(2)]
    assert facts[0] == facts[1]
    assert len(list(tmp_path.glob("latency/*/dev.lat.json"))) == 1


def test_the_table_of_another_device_is_refused_unless_that_is_said(tmp_path: Path) -> None:
    path, out = tmp_path / "paper.lat.json", tmp_path / "out"
    paper_table().write(path)
    elsewhere = files.read_json(path)
    elsewhere["fingerprint"]["accelerator"] = "a device of paper"
    files.write_json(path, elsewhere)
    given: dict[str, Any] = {"latency": 0.6, "table": path, "data": None, "budget": "none", "out": out}
    with pytest.raises(UsageError, match=r"was measured elsewhere .*a device of paper.*--other-device"):
        find("resnet20", **given)
    said: list[str] = []
    found = find("resnet20", other_device=True, say=said.append, **given)
    facts = found.architecture.provenance["latency"]
    assert facts["verified"] is False
    assert facts["high_ms"] <= 0.6 * facts["reference_ms"]
    assert Architecture.read(out / "architecture.yaml") == found.architecture
    assert files.read_json(out / "results.json")["conditions"]["latency"] == facts
    assert "not verified on its device" in said[-1]


def test_a_time_out_of_reach_says_what_can_be_reached() -> None:
    network, space = on_device.aimed(traced(), SearchSpace(), paper_table())
    with pytest.raises(InfeasibleError, match=r"the target latency 0\.001 ms asks for at most 1,000 nanosec"):
        uniform_widths(network.cost, space.allowed(network.graph), [Target.parse("latency", "1us")])
