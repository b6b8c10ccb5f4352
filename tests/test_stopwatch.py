from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from latency_case import paper_table, traced

from archsearch import files, stopwatch
from archsearch.api import find
from archsearch.architecture import Architecture
from archsearch.cli import main
from archsearch.errors import SpecError, UsageError
from archsearch.latency.devices import opened
from archsearch.on_device import TargetDevice, aimed
from archsearch.pruning import uniform_widths
from archsearch.space import SearchSpace
from archsearch.targets import Target


@pytest.mark.slow  # three processes that each build, time and end
def test_the_found_network_is_measured_in_fresh_processes(tmp_path: Path, capsys: Any) -> None:
    network, space = aimed(traced(), SearchSpace(), paper_table())
    widths = uniform_widths(network.cost, space.allowed(network.graph), [Target.parse("latency", 0.6)])
    path = tmp_path / "a.yaml"
    network.architecture(widths).write(path)
    with pytest.raises(SpecError, match="was not found for a latency"):
        stopwatch.verify_file(path, say=lambda line: None)
    facts = stopwatch.predicted(paper_table(), widths)
    stopwatch.note(path, {**facts, "accelerator": "a device of paper"})
    with pytest.raises(UsageError, match=r"was found for a device of paper, .* this is .*: verify it there"):
        stopwatch.verify_file(path, say=lambda line: None)
    stopwatch.note(path, {**facts, "low_ms": "short"})
    with pytest.raises(SpecError, match=r"provenance\.latency\.low_ms: must be milliseconds"):
        stopwatch.verify_file(path, say=lambda line: None)
    stopwatch.note(path, facts)
    key = Architecture.read(path).key
    assert main(["verify", str(path)]) == 0
    facts = Architecture.read(path).provenance["latency"]
    assert facts["verified"] is True
    assert len(facts["measured_shares"]) == stopwatch.PROCESSES
    assert 0 < facts["measured_share"] < 2
    assert sorted(facts["measured_shares"])[1] == facts["measured_share"]
    assert facts["torch"] == torch.__version__
    assert Architecture.read(path).key == key
    assert "measured" in capsys.readouterr().out
    assert main(["verify", str(path), "--device", "cuda:7"]) == 2
    assert "cuda:7" in capsys.readouterr().err


@pytest.mark.parametrize(("share", "code"), [(0.59, 0), (0.61, 6)])
def test_verify_fails_where_the_target_is_missed(
    share: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def measured(path: Path, facts: dict[str, Any], **_more: Any) -> dict[str, Any]:
        assert facts["device"] == "cpu"
        return {**facts, "measured_share": share, "measured_ms": 1.0, "stable": True, "verified": True}

    monkeypatch.setattr(stopwatch, "measured", measured)
    found = architecture_at(0.6)
    widths = {name: group.width for name, group in found.widths.items()}
    here = {**stopwatch.predicted(paper_table(), widths), "accelerator": opened("cpu").facts()["accelerator"]}
    provenance = {"target": "latency 0.6", "latency": here}
    found.model_copy(update={"provenance": provenance}).write(tmp_path / "a.yaml")
    assert main(["verify", str(tmp_path / "a.yaml"), "--device", "cpu"]) == code
    assert Architecture.read(tmp_path / "a.yaml").provenance["latency"]["measured_share"] == share
    assert ("is too slow on this device" in capsys.readouterr().err) == bool(code)


@pytest.mark.parametrize(
    ("share", "ms", "target", "said"),
    [
        (0.58, 0.3, 0.6, "the target latency 0.6 is met"),
        (0.61, 0.3, 0.6, "the target latency 0.6 is MISSED"),
        (0.58, 0.3, "0.25ms", "the target latency 0.25 ms is MISSED"),
        (0.58, 0.3, "300us", "the target latency 0.3 ms is met"),
    ],
)
def test_the_verdict_goes_by_what_was_measured(share: float, ms: float, target: Any, said: str) -> None:
    facts = {
        "predicted_ms": 0.2,
        "low_ms": 0.1,
        "high_ms": 0.3,
        "reference_ms": 0.5,
        "verified": True,
        "measured_ms": ms,
        "measured_share": share,
        "stable": True,
    }
    assert stopwatch.verdict(facts, [Target.parse("latency", target)]).endswith(said)


def architecture_at(keep: float) -> Architecture:
    network, space = aimed(traced(), SearchSpace(), paper_table())
    allowed = space.allowed(network.graph)
    return network.architecture(uniform_widths(network.cost, allowed, [Target.parse("latency", keep)]))


def test_a_network_is_measured_once_for_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def measured(path: Path, facts: dict[str, Any], **_more: Any) -> dict[str, Any]:
        calls.append(Architecture.read(path).key)
        return {**facts, "measured_share": 0.5, "measured_ms": 1.0, "stable": True, "verified": True}

    monkeypatch.setattr(stopwatch, "measured", measured)
    clock = stopwatch.Stopwatch(TargetDevice(paper_table(), here=True), tmp_path)
    first, second = architecture_at(0.6), architecture_at(0.7)
    seen = [clock(first), clock(second), clock(first)]
    assert calls == [first.key, second.key]
    assert seen[0] == seen[2]
    assert seen[0]["measured_share"] == 0.5
    assert seen[0]["predicted_ms"] < seen[1]["predicted_ms"]


def test_of_several_processes_that_train_together_one_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = stopwatch.Stopwatch(TargetDevice(paper_table(), here=True), tmp_path)
    known = {"table": paper_table().key[:16], "measured_share": 0.5, "verified": True}

    def wait(_seconds: float) -> None:
        """The first process has measured by now."""
        key = architecture_at(0.6).key[:16]
        (tmp_path / stopwatch.MEASURED).mkdir(parents=True, exist_ok=True)
        files.write_json(tmp_path / stopwatch.MEASURED / f"{known['table']}-{key}.json", known)

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(stopwatch.time, "sleep", wait)
    assert clock(architecture_at(0.6)) == known


def test_away_from_the_device_a_network_is_predicted() -> None:
    seen = stopwatch.Stopwatch(TargetDevice(paper_table(), here=False), Path("nowhere"))(architecture_at(0.6))
    assert seen["verified"] is False
    assert seen["high_ms"] <= 0.6 * seen["reference_ms"]


def test_a_file_says_which_latency_it_was_found_for() -> None:
    architecture = architecture_at(0.6).model_copy(
        update={"provenance": {"target": "flops 0.5, latency 1.2 ms"}}
    )
    assert stopwatch.targets_in(architecture) == [Target.parse("latency", "1.2ms")]
    assert stopwatch.targets_in(architecture_at(0.6)) == []


def test_a_measurement_outside_of_the_prediction_is_said() -> None:
    facts = {"predicted_ms": 0.2, "low_ms": 0.19, "high_ms": 0.21, "reference_ms": 0.5, "verified": True}
    facts |= {"measured_ms": 0.2, "measured_share": 0.4, "stable": True}
    assert "outside" not in stopwatch.verdict(facts, [])
    assert stopwatch.verdict({**facts, "measured_share": 0.44}, []).endswith("outside of what was predicted")


def test_the_file_of_a_network_that_was_found_before_has_the_latest_latency(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(path: Path, facts: dict[str, Any], **_more: Any) -> dict[str, Any]:
        return {**facts, "measured_share": 0.6, "measured_ms": 1.0, "stable": True, "verified": True}

    monkeypatch.setattr(stopwatch, "measured", measured)
    paper_table().write(tmp_path / "here.lat.json")
    elsewhere = files.read_json(tmp_path / "here.lat.json")
    elsewhere["fingerprint"]["accelerator"] = "a device of paper"
    files.write_json(tmp_path / "away.lat.json", elsewhere)
    given: dict[str, Any] = {"latency": 0.6, "data": None, "budget": "none", "out": tmp_path / "out"}
    given["store"] = tmp_path / "store"
    found = find("resnet20", table=tmp_path / "away.lat.json", other_device=True, **given)
    assert found.architecture.provenance["latency"]["verified"] is False
    again = find("resnet20", table=tmp_path / "here.lat.json", **given)
    assert again.architecture.key == found.architecture.key
    kept = Architecture.read(tmp_path / "out" / "architecture.yaml").provenance["latency"]
    assert kept["verified"] is True
    assert again.record.arms[-1].latency == 0.6


def test_a_network_in_hand_that_no_other_process_can_build_is_refused_before_anything_long(
    tmp_path: Path,
) -> None:
    class Own(torch.nn.Sequential):
        pass

    network = Own(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 8, 3))
    with pytest.raises(UsageError, match=r"measured in processes of their own.*give a name or a factory"):
        find(
            network,
            example=torch.zeros(1, 3, 8, 8),
            latency=0.6,
            runtime="torch",
            data=None,
            budget="none",
            device="cpu",
            store=tmp_path,
        )
    assert not list(tmp_path.iterdir())
