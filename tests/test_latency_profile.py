from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from archsearch import on_device
from archsearch.cli.main import main
from archsearch.cli.profile_commands import accuracy_verdict
from archsearch.errors import PreemptedError, UsageError
from archsearch.latency.accuracy import assess, inside, rank_correlation
from archsearch.latency.knots import choose_knots
from archsearch.latency.layers import find_layers
from archsearch.latency.meter import Settings
from archsearch.latency.quantum import Stairs, choose_widths
from archsearch.latency.sampling import equal_macs_widths, random_widths
from archsearch.latency.table import FITTED, LatencyTable
from archsearch.space import Bounds, SearchSpace
from archsearch.vanished import Vanished
from tests.latency_case import PaperDevice, profiled, traced

NETWORK = traced()
STEPS = [np.arange(8, size + 1, 8) for size in NETWORK.cost.sizes]


@pytest.fixture(scope="module")
def table() -> LatencyTable:
    return profiled(NETWORK, PaperDevice(block=8), held_out=20).run()


def test_a_device_without_noise_is_predicted_exactly(table: LatencyTable) -> None:
    report = assess(table)
    assert table.quantum == 8
    assert report.table.worst < 1e-6
    assert report.table.spearman > 0.99  # equal times are ties
    assert report.noise == pytest.approx(0)
    assert report.complaints == ()
    assert report.others["MACs only"].worst > 0.01


def test_the_reference_is_one_of_the_networks(table: LatencyTable) -> None:
    ms, *_ = table.predict(table.sizes)
    exact = PaperDevice(block=8).milliseconds(NETWORK.model.eval(), NETWORK.example)
    assert table.reference_ms == pytest.approx(exact)
    assert ms == pytest.approx(exact, rel=1e-6)


def test_a_network_that_was_never_measured_is_predicted_from_its_layers(table: LatencyTable) -> None:
    row = np.array([step[0] for step in STEPS])
    widths = NETWORK.cost.mapping(row)
    small = NETWORK.inherit({name: np.arange(width) for name, width in widths.items()})
    exact = PaperDevice(block=8).milliseconds(small.eval(), NETWORK.example)
    assert table.predict(row)[0] == pytest.approx(exact, rel=1e-6)


def test_macs_of_the_table_are_those_of_the_cost_model(table: LatencyTable) -> None:
    rows = np.stack([np.random.default_rng(0).choice(step, 10) for step in STEPS], axis=1)
    assert table.macs(rows).tolist() == NETWORK.cost.macs(rows).tolist()


def test_noise_and_drift_are_taken_out_by_the_reference_beside() -> None:
    device = PaperDevice(block=8, noise=0.02, drift=1.02)
    found = profiled(NETWORK, device, calibration=20, held_out=20).run()
    report = assess(found)
    assert device.speed > 1.3  # the device got slower by that much meanwhile
    assert report.table.within_10 >= 0.95
    assert report.table.mape < 0.02
    widths, ms = found.networks("held-out")
    assert rank_correlation(found.predict(widths)[0], ms) > 0.97


def test_the_interval_of_predictions_holds_nine_of_ten_networks_that_they_do_not_know() -> None:
    noisy = profiled(NETWORK, PaperDevice(block=8, noise=0.05), calibration=40, held_out=80).run()
    found = inside(noisy)
    assert found.shape[1] == len(noisy.networks(*FITTED)[0])
    assert 0.85 <= found.mean() <= 0.97
    assert assess(noisy).coverage_in_use == found.mean()


def test_networks_without_branches_are_predicted_where_such_were_measured() -> None:
    class Leftover(PaperDevice):
        """Takes two microseconds for each layer that is gone."""

        def milliseconds(self, model: nn.Module, example: Any) -> float:
            gone = sum(isinstance(module, Vanished) for module in model.modules()) / 2  # a norm beside each
            return super().milliseconds(model, example) + 0.002 * gone

    whole = NETWORK.with_branches()
    table = profiled(whole, Leftover(block=8), calibration=20, held_out=20).run()
    assert table.knows_branches
    assert assess(table).table.worst < 0.01
    widths = dict.fromkeys(whole.graph.sizes, 8) | dict.fromkeys(whole.graph.branches[3].groups, 0)
    small = whole.inherit({name: np.arange(width) for name, width in widths.items()})
    exact = Leftover(block=8).milliseconds(small.eval(), NETWORK.example)
    assert table.predict(whole.cost.array(widths))[0] == pytest.approx(exact, rel=0.01)
    other = profiled(NETWORK, Leftover(block=8), calibration=20, held_out=20).run()
    assert not other.knows_branches
    assert other.predict(whole.cost.array(widths))[0] < 0.99 * exact


def test_no_network_vouches_for_itself(table: LatencyTable) -> None:
    networks = list(table.content.networks)
    odd = networks[5].times
    times = odd.model_copy(update={"ms": tuple(1.5 * ms for ms in odd.ms)})
    networks[5] = networks[5].model_copy(update={"times": times})
    found = inside(LatencyTable(table.content.model_copy(update={"networks": tuple(networks)})))
    assert not found[:, 5].any()


def test_a_stopped_profile_goes_on_and_ends_alike(tmp_path: Path) -> None:
    journal = tmp_path / "dev.lat.json.part"
    device = PaperDevice(block=8)
    whole = profiled(NETWORK, PaperDevice(block=8)).run()

    def stop(what: str, done: int, total: int) -> None:
        if what == "network" and done >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profiled(NETWORK, device, journal=journal, progress=stop).run()
    (part,) = tmp_path.glob("dev.lat.json-*.part")
    with part.open("a") as file:
        file.write('{"network 1 2 3": {"ms": [1.0')  # the writer was killed
    before = device.prepared
    said: list[str] = []
    profile = profiled(NETWORK, device, journal=journal, say=said.append)
    resumed = profile.run()
    assert said[0].startswith(f"goes on from {part}: found ")
    assert said[0].endswith(" layers and 8 networks measured")
    assert device.prepared - before < 30  # the networks that were left, and the references
    assert resumed.content.cells == whole.content.cells
    assert resumed.content.networks == whole.content.networks
    profile.finish()
    assert not part.exists()


def test_what_was_amiss_is_said_once_a_kind() -> None:
    device, said = PaperDevice(), list[str]()
    device.flags["throttled (heat)"] = 3
    profiled(NETWORK, device, say=said.append).run()
    assert [line for line in said if "throttled" in line] == ["throttled (heat): 3 measurements"]


def test_what_was_measured_under_other_conditions_stays_and_is_not_used(tmp_path: Path) -> None:
    journal = tmp_path / "part"
    profiled(NETWORK, PaperDevice(), journal=journal).run()
    said: list[str] = []
    profiled(NETWORK, PaperDevice(), journal=journal, batch=2, say=said.append).run()
    assert not any("goes on" in line for line in said)
    device = PaperDevice()
    profiled(NETWORK, device, journal=journal, say=said.append).run()
    assert any("goes on" in line for line in said)
    assert device.measured < 10  # the references alone


def test_with_little_time_fewer_cells_are_measured() -> None:
    rich = profiled(NETWORK, PaperDevice(block=1)).run()
    said: list[str] = []
    device = PaperDevice(block=1)
    poor = profiled(NETWORK, device, max_seconds=30.0, say=said.append).run()
    assert "as time allows in 30 s" in said[0]
    assert len(poor.content.cells) < len(rich.content.cells)
    assert device.now_s < 31
    assert len(poor.content.networks) == len(rich.content.networks)


def test_a_profile_of_limited_time_goes_on_with_the_cells_that_it_chose(tmp_path: Path) -> None:
    class Switch(PaperDevice):
        on = True

        def measure(self, calls, protocol):  # type: ignore[no-untyped-def]
            if self.measured > 150 and self.on:
                raise KeyboardInterrupt
            return super().measure(calls, protocol)

    given = {"max_seconds": 30.0, "journal": tmp_path / "part"}
    whole = profiled(NETWORK, PaperDevice(block=1), max_seconds=30.0).run().content
    device = Switch(block=1)
    with pytest.raises(KeyboardInterrupt):
        profiled(NETWORK, device, **given).run()
    device.on, device.now_s = False, 0.0
    resumed = profiled(NETWORK, device, **given).run().content
    assert resumed.axes == whole.axes
    assert resumed.measuring_s == pytest.approx(whole.measuring_s, rel=0.02)
    assert resumed.preparing_s == pytest.approx(whole.preparing_s, rel=0.1)


def test_too_little_time_is_said_before_anything_is_measured() -> None:
    device = PaperDevice()
    with pytest.raises(UsageError, match="--max-seconds 1: 25 networks alone take about"):
        profiled(NETWORK, device, max_seconds=1.0).run()
    assert device.now_s < 2


def test_a_device_that_is_slower_than_it_seemed_stops_and_can_go_on() -> None:
    class Tiring(PaperDevice):
        def measure(self, calls, protocol):  # type: ignore[no-untyped-def]
            self.now_s += self.measured * 0.1
            return super().measure(calls, protocol)

    with pytest.raises(PreemptedError, match="the same command goes on"):
        profiled(NETWORK, Tiring(), max_seconds=30.0).run()


def test_the_grid_is_whole_where_the_cells_suffice() -> None:
    layers = find_layers(NETWORK)
    widths = SearchSpace(Bounds(round_to=8)).allowed(NETWORK.graph)
    sizes = NETWORK.graph.sizes
    coarse = {layer.signature: (Stairs(16), Stairs(16)) for layer in layers}
    axes = choose_knots(layers, widths, sizes, coarse, 8, 300)
    assert {one.reads for one in axes} == {
        (3, 8, 16),  # the first layer shares its signature with those of the first stage
        (8, 16),
        (24, 32),
        (8, 16, 24, 32),
        (56, 64),
        tuple(range(8, 65, 8)),
    }
    assert {one.reads_step for one in axes} == {1}


def test_a_grid_that_is_too_large_has_the_ends_of_the_steps() -> None:
    layers = find_layers(NETWORK)
    widths = SearchSpace(Bounds(round_to=1)).allowed(NETWORK.graph)
    stairs = {layer.signature: (Stairs(16), Stairs(16)) for layer in layers}
    axes = choose_knots(layers, widths, NETWORK.graph.sizes, stairs, 1, 100)
    cells = sum(len(one.reads) * len(one.makes) for one in axes)
    assert cells <= 100
    for one in axes:
        assert all(channels % 16 == 0 or channels < 16 for channels in one.reads[:-1] + one.makes[:-1])
        assert one.makes[-1] in (10, 16, 32, 64)


def test_the_axis_along_which_time_is_no_line_has_more_points() -> None:
    layers = find_layers(NETWORK)
    widths = SearchSpace(Bounds(round_to=1)).allowed(NETWORK.graph)
    stairs = {layer.signature: (Stairs(1, 0.03), Stairs(1, 0.5)) for layer in layers}
    axes = choose_knots(layers, widths, NETWORK.graph.sizes, stairs, 1, 300)
    wide = [one for one in axes if min(len(one.reads), len(one.makes)) > 1 and one.signature.kind == "conv"]
    assert len(wide) > 4
    assert all(len(one.makes) > len(one.reads) for one in wide)


def test_widths_below_the_quantum_are_on_no_step() -> None:
    layers = find_layers(NETWORK)
    widths = choose_widths(on_device.allowed_of(NETWORK), 16)
    stairs = {layer.signature: (Stairs(32), Stairs(32)) for layer in layers}
    axes = choose_knots(layers, widths, NETWORK.graph.sizes, stairs, 16, 40)
    assert axes[0].reads[:2] == (3, 8)  # an image's channels, and a width of a narrow group
    assert {reads for one in axes for reads in one.reads if reads >= 32} == {32, 64}


def test_groups_that_the_quantum_leaves_too_few_widths_have_finer_ones() -> None:
    said: list[str] = []
    table = profiled(NETWORK, PaperDevice(block=16), held_out=20, say=said.append).run()
    assert table.quantum == 16
    assert said[-1] == "7 groups have finer multiples: these would leave them fewer than 4 widths"
    widths = {group.size: group.widths for group in table.content.groups}
    assert widths == {16: (8, 16), 32: (8, 16, 24, 32), 64: (16, 32, 48, 64)}
    assert assess(table).table.worst < 1e-6
    _, space = on_device.aimed(NETWORK, SearchSpace(), table)
    assert {tuple(steps) for steps in space.allowed(NETWORK.graph).values()} == set(widths.values())
    asked = profiled(NETWORK, PaperDevice(block=16), round_to=16, held_out=20).run()
    assert {group.widths for group in asked.content.groups if group.size == 16} == {(16,)}


def test_equal_macs_are_equal() -> None:
    target = NETWORK.cost.reference.macs // 2
    rows = equal_macs_widths(STEPS, NETWORK.cost.macs, target, 10, np.random.default_rng(0))
    assert len(np.unique(rows, axis=0)) == 10
    assert np.abs(NETWORK.cost.macs(rows) / target - 1).max() <= 0.02


def test_where_half_of_the_macs_is_out_of_reach_there_are_equal_ones_all_the_same() -> None:
    found = profiled(NETWORK, PaperDevice(block=16), round_to=16, held_out=20).run()
    rows, _ = found.networks("equal-macs")
    macs = NETWORK.cost.macs(rows)
    assert len(rows) == 10
    assert np.ptp(macs) <= 0.03 * macs.mean()
    assert macs.min() > 0.5 * NETWORK.cost.reference.macs


def test_random_networks_are_distinct_and_of_all_sizes() -> None:
    rows = random_widths(STEPS, 40, np.random.default_rng(0))
    assert len(np.unique(rows, axis=0)) == 40
    shares = NETWORK.cost.macs(rows) / NETWORK.cost.reference.macs
    assert shares.min() < 0.3
    assert shares.max() > 0.7
    assert all(width in step for row in rows for width, step in zip(row, STEPS, strict=True))


def test_a_network_too_small_for_a_table_is_refused() -> None:
    with pytest.raises(UsageError, match="too small for a table"):
        profiled(traced("lenet5", (1, 28, 28)), PaperDevice(), round_to=64).run()


def test_a_bad_table_says_why() -> None:
    found = profiled(NETWORK, PaperDevice(block=8, noise=2.0), calibration=20, held_out=20).run()
    report = assess(found)
    assert any("within 10 %" in complaint for complaint in report.complaints)
    assert any("noisy" in complaint for complaint in report.complaints)


@pytest.mark.slow
def test_the_command_measures_a_real_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "dev.lat.json"
    words = ["profile", "--model", "resnet20", "--input-shape", "3,16,16", "--max-cells", "60"]
    words += ["--calibration", "12", "--held-out", "10", "--round-to", "8", "--out", str(out)]
    assert main(words) == 0
    told = capsys.readouterr()
    assert "takes about" in told.err
    for word in ("latency table", "MACs only", "sum of cells", "noise", f"wrote {out}"):
        assert word in told.out
    assert not list(tmp_path.glob("*.part"))
    table = LatencyTable.read(out)
    ms, low, high = table.predict(table.sizes)
    assert low < ms < high
    assert table.content.conditions.model == "resnet20"


def test_the_command_wants_a_model() -> None:
    assert main(["profile", "--out", "x.json"]) == 2


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"blocks": 2}, "blocks 2: at least 3"),
        ({"round_to": 0}, "round_to 0: channels are multiples of 1 or more"),
        ({"max_seconds": float("nan")}, "max_seconds nan: a number above 0"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_measured(wrong: dict[str, float], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Settings(**wrong)  # type: ignore[arg-type]


def test_what_was_not_tested_at_equal_macs_is_said(table: LatencyTable) -> None:
    networks = [record for record in table.content.networks if record.role != "equal-macs"]
    report = assess(LatencyTable(table.content.model_copy(update={"networks": tuple(networks)})))
    lines = accuracy_verdict(report)
    assert "at equal MACs: not tested, since there are too few networks of equal MACs" in lines
    assert not any("nan" in line for line in lines)
