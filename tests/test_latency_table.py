from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from archsearch.errors import SpecError, UsageError
from archsearch.latency.content import NetworkRecord
from archsearch.latency.table import LatencyTable
from archsearch.targets import Target
from tests.latency_case import PaperDevice, profiled, traced

NETWORK = traced()


@pytest.fixture(scope="module")
def table() -> LatencyTable:
    return profiled(NETWORK, PaperDevice(block=8, noise=0.01)).run()


@pytest.fixture(scope="module")
def data(table: LatencyTable, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("table") / "dev.lat.json"
    table.write(path)
    return json.loads(path.read_text())


def test_a_table_reads_back_and_predicts_the_same(table: LatencyTable, tmp_path: Path) -> None:
    table.write(tmp_path / "dev.lat.json")
    again = LatencyTable.read(tmp_path / "dev.lat.json")
    assert again.content == table.content
    assert again.key == table.key
    assert again.names == NETWORK.cost.names
    assert again.predict(again.sizes) == table.predict(table.sizes)


def test_held_out_networks_are_learnt_from_once_they_have_tested(table: LatencyTable) -> None:
    def slower(network: NetworkRecord) -> NetworkRecord:
        if network.role in ("calibration", "repeat"):
            return network
        times = network.times.model_copy(update={"ms": tuple(2 * ms for ms in network.times.ms)})
        return network.model_copy(update={"times": times})

    networks = tuple(map(slower, table.content.networks))
    other = LatencyTable(table.content.model_copy(update={"networks": networks}))
    widths, _ = table.networks("held-out")
    assert other.tested(widths)[0].tolist() == table.tested(widths)[0].tolist()
    assert (other.predict(widths)[0] > 1.2 * table.predict(widths)[0]).all()


def test_the_file_holds_raw_blocks_and_nothing_fitted(data: Any) -> None:
    assert data["format"] == 1
    assert len(data["cells"][0]["times"]["ms"]) == 10
    assert len(data["networks"][0]["times"]["reference_ms"]) == 10
    assert "coefficients" not in json.dumps(data)


def test_the_table_of_another_device_is_refused_where_the_device_is_said(
    table: LatencyTable, tmp_path: Path
) -> None:
    path = tmp_path / "dev.lat.json"
    table.write(path)
    own = table.content.fingerprint
    LatencyTable.read(path, own)
    other = {**own, "accelerator": "another"}
    with pytest.raises(UsageError, match=r"was measured elsewhere .accelerator: .* and another"):
        LatencyTable.read(path, other)
    assert LatencyTable.read(path).key == table.key


def _set(*place: str | int, to: Any) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        for part in place[:-1]:
            data = data[part]
        data[place[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_set("format", to=2), "format: is 2, this version reads 1"),
        (_set("quantum", to="8"), "quantum: "),
        (_set("quantum", to=0), "quantum: "),
        (_set("surprise", to=1), "surprise: "),
        (_set("cells", 0, "times", "ms", 0, to=-1.0), "cells.0.times: times are above zero"),
        (_set("cells", 0, "times", "ms", to=[1.0]), "cells.0.times: ms and reference_ms"),
        (_set("cells", 0, "reads", to=5), "no cell of axes"),
        (_set("cells", 0, "signature", to=99), "."),
        (_set("networks", 0, "widths", to=[1]), "a network has not one width for each group"),
        (_set("networks", 0, "widths", 0, to=3), "no known width"),
        (_set("networks", 0, "role", to="best"), "networks.0.role"),
        (_set("networks", to=[]), "networks: 0 calibration networks"),
        (_set("layers", 0, "makes", "groups", to={"nobody": 1}), "names a group that is not there"),
        (_set("layers", 0, "signature", "bias", to=True), "has a signature that no axes belong to"),
        (_set("groups", 0, "widths", to=[8, 8]), "groups.0: widths must rise"),
        (_set("groups", 0, "size", to=4), "groups.0: widths must not be above the size"),
        (_set("groups", 1, "name", to="conv1"), "two groups have one name"),
        (_set("layers", 0, "reads", "constant", to=2**40), "layers.0.reads.constant"),
        (_set("axes", 0, "reads", to=[3, 3]), "channels must rise"),
        (_set("axes", 0, "signature", "stride", to=[]), "axes.0.signature: kernel, stride, padding"),
        (_set("axes", 0, "signature", "stride", to=[1, 0]), "axes.0.signature: kernel, stride and dilation"),
        (_set("staircases", 0, "ms", to=[1.0, 2.0]), "staircases.0: channels must rise, from 1 on, with one"),
    ],
)
def test_a_file_that_breaks_a_rule_says_where(
    data: Any, change: Callable[[Any], None], said: str, tmp_path: Path
) -> None:
    wrong = copy.deepcopy(data)
    change(wrong)
    path = tmp_path / "dev.lat.json"
    path.write_text(json.dumps(wrong))
    with pytest.raises(SpecError) as caught:
        LatencyTable.read(path)
    assert said in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "null", '{"format": 1}', '{"format": NaN}', "[" * 100_000])
def test_a_file_that_is_no_table_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "dev.lat.json"
    path.write_text(text)
    with pytest.raises(SpecError):
        LatencyTable.read(path)


def test_the_table_of_another_network_is_refused(table: LatencyTable) -> None:
    table.check_groups(NETWORK.graph.sizes)
    with pytest.raises(UsageError, match="is of another network: its group 'conv1' has 16 channels, here 32"):
        table.check_groups({**NETWORK.graph.sizes, "conv1": 32})
    with pytest.raises(UsageError, match="in another order"):
        table.check_groups(dict(reversed(NETWORK.graph.sizes.items())))


def test_the_counter_is_one_that_the_solver_can_use(table: LatencyTable) -> None:
    count = table.counter()
    widths = [np.array(group.widths) for group in table.content.groups]
    rows = np.stack([np.random.default_rng(0).choice(step, 200) for step in widths], axis=1)
    bound = count(rows)
    assert bound.dtype == np.int64
    _, _, high = table.predict(rows)
    assert (bound >= high * 1e6).all()
    assert count(rows[3]) == bound[3]
    wider = np.maximum(rows[:100], rows[100:])
    assert (count(wider) >= bound[:100]).all()
    limit = Target.parse("flops", "0.6").limit(int(table.reference_ms * 1e6))
    assert (bound <= limit).any()
