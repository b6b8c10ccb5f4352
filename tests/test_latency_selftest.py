from __future__ import annotations

import pytest
from virtual_device import VirtualDevice

from archsearch.cli.main import main
from archsearch.latency.devices import Cpu
from archsearch.latency.measure import Measurement, Protocol
from archsearch.latency.selftest import check_clock, check_same, check_scale, selftest

QUICK = Protocol(warm_up_s=0.01, warm_up_calls=2, blocks=3, block_s=0.01)


class Broken(Cpu):
    """A processor whose clock gives microseconds for milliseconds."""

    def elapsed_ms(self, start: float, end: float) -> float:
        return super().elapsed_ms(start, end) * 1e3


def beside(*ratios: float) -> list[Measurement]:
    return [Measurement((ratio,), ratios=(ratio,) * 3) for ratio in ratios]


def test_a_clock_in_the_wrong_unit_is_found() -> None:
    found = check_clock(Broken())
    assert not found.ok
    assert "ms on the wall are" in found.words


def test_a_clock_that_stands_still_is_called_a_busy_machine() -> None:
    assert "busy with something else" in check_clock(VirtualDevice(kind="cpu")).words


@pytest.mark.parametrize(("ratios", "ok"), [((1, 2, 4), True), ((1, 1, 1), False), ((1, 2, 6), False)])
def test_work_must_scale(ratios: tuple[float, ...], ok: bool) -> None:
    found = check_scale(beside(*ratios))
    assert found.ok is ok
    assert f"1 : {ratios[1]:.2f} : {ratios[2]:.2f}" in found.words


@pytest.mark.parametrize(("ratio", "ok"), [(1.0, True), (0.985, True), (1.05, False)])
def test_a_call_must_take_as_long_as_itself(ratio: float, ok: bool) -> None:
    assert check_same(beside(ratio)[0]).ok is ok


def test_the_processor_is_looked_at_in_four_ways() -> None:
    found = list(selftest("cpu", QUICK))
    assert [each.name for each in found] == ["clock", "scale", "noise", "torch.utils.benchmark"]
    (scale,) = (each for each in found if each.name == "scale")
    one_two_four = [float(part) for part in scale.words.split("take ")[1].split(" : ")]
    assert one_two_four == pytest.approx([1, 2, 4], rel=0.25)  # on a busy machine, in a tenth of a second


def test_the_command_tells_each_finding_and_fails_with_a_bad_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from archsearch.latency import selftest as module
    from archsearch.latency.selftest import Check

    findings = [Check("clock", True, "fine"), Check("scale", True, "fine")]
    monkeypatch.setattr(module, "selftest", lambda device: iter(findings))
    assert main(["selftest", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "ok  clock: fine\nok  scale: fine\n"
    findings[1] = Check("scale", False, "1 : 1 : 1")
    assert main(["selftest", "--device", "cpu"]) == 8
    captured = capsys.readouterr()
    assert "BAD scale: 1 : 1 : 1" in captured.out
    assert "cannot be trusted (scale)" in captured.err
