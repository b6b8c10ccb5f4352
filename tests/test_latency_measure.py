from __future__ import annotations

import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from virtual_device import VirtualDevice

from archsearch.errors import ResourceError, UsageError
from archsearch.latency import measure as loop
from archsearch.latency.devices import Cpu, opened
from archsearch.latency.measure import (
    Measurement,
    Protocol,
    beside_replay,
    measure,
    measure_beside_replays,
    measure_interleaved,
)
from archsearch.latency.runtimes import pinned_threads

QUICK = Protocol(warm_up_s=0.002, warm_up_calls=2, blocks=3, block_s=0.002)

Times = Callable[..., list[Measurement]]


# ------------------------------------------------------------------------------------- the timing loop


def reports_the_truth(times: Times) -> None:
    """Check the loop against times that are known exactly, on a device with every trap."""
    device = VirtualDevice()
    calls = [device.call("A", 2.0), device.call("B", 1.0)]
    first, second = times(calls, Protocol(), device)
    assert first.milliseconds == pytest.approx([2.0] * 10)
    assert second.milliseconds == pytest.approx([1.0] * 10)
    assert second.ratios == pytest.approx([0.5] * 10)
    assert first.stable
    # While it warms up, each call of A takes 2.5 ms with its wait and each of B 1.5: 20 and 33 fill a block.
    timed = [each for each in device.log if each != "wait"][-10 * (21 + 34) :]
    assert timed == (["A"] * 21 + ["B"] * 34) * 10
    # On the wall a block takes its calls and what the first one paid.
    assert first.wall_ms == pytest.approx([2.0 + 0.51 / 21] * 10, rel=1e-3)


def flushes_outside_of_the_time(times: Times) -> None:
    device = VirtualDevice()
    (only,) = times([device.call("A", 2.0)], Protocol(), device, flush=True)
    assert only.milliseconds == pytest.approx([2.0] * 10)
    assert device.flushes == 10 * 21


def drops_what_was_throttled(times: Times) -> None:
    device = VirtualDevice(slow=lambda now: frozenset({"thermal limit"} if 0.5 < now < 0.7 else ()))
    (only,) = times([device.call("A", 2.0)], Protocol(), device)
    assert len(only.milliseconds) == 10
    # Blocks of 42.5 ms start at 0.2 s: the eighth ends at 0.54 s, and the twelfth starts at 0.67 s.
    assert only.flags == ("throttled (thermal limit): 5 blocks were dropped",)


def warms_up_by_calls_too(times: Times) -> None:
    device = VirtualDevice(warm_ms=900, cold_factor=1.2)
    (only,) = times([device.call("A", 100.0)], Protocol(), device)
    assert only.milliseconds == pytest.approx([100.0] * 10)


CHECKS = (reports_the_truth, flushes_outside_of_the_time, drops_what_was_throttled, warms_up_by_calls_too)
FLUSH = """        if flush:
            emptying = device.seconds()
            device.flush()
            began += device.seconds() - emptying
"""
START = "        start = device.event()\n"


@pytest.mark.parametrize("check", CHECKS)
def test_the_timing_loop(check: Callable[[Times], None]) -> None:
    check(measure_interleaved)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("counts = [_warm_up(call, device, protocol) for call in calls]", "counts = [20, 33][: len(calls)]"),
        ("device.synchronise()\n        durations", "durations"),
        ("< protocol.warm_up_s or len(durations)", "< 0 or len(durations)"),
        ("    device.synchronise()\n    wall_ms", "    wall_ms"),
        ("for pair in marks[1:]", "for pair in marks"),
        ("range(count + 1)", "range(count)"),
        ("(device.seconds() - began) * 1e3 / (count + 1)", "(device.seconds() - began) * 1e3 / count"),
        ("(device.seconds() - began) * 1e3 /", "(device.seconds() - began) /"),
        ("device.elapsed_ms(start, end) / 1e3", "device.elapsed_ms(start, end)"),
        ("device.elapsed_ms(*pair) for", "device.elapsed_ms(*pair) / 1e3 for"),
        ("sum(self.calls_ms) / len(self.calls_ms)", "sum(self.calls_ms)"),
        ("/ round_[0].mean_ms", "/ rounds[0][0].calls_ms[0] / 2"),
        ("round_[place].mean_ms / round_[0]", "round_[0].mean_ms / round_[place]"),
        (FLUSH + START, START + FLUSH),
        ("        if flush:", "        if not marks:"),
        ("or len(durations) < protocol.warm_up_calls", ""),
        ("slow |= device.slowdowns()", "pass"),
        ("slow = device.slowdowns()", "slow = frozenset()"),
        ("dropped.append(slow)\n        else:", "dropped.append(slow)\n        if True:"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_timing_loop_is_found(right: str, wrong: str) -> None:
    source = Path(loop.__file__).read_text(encoding="utf-8")
    assert source.count(right) == 1, right
    mutant = types.ModuleType("mutant")
    mutant.__file__ = loop.__file__
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "mutant", mutant)
        exec(compile(source.replace(right, wrong), loop.__file__, "exec"), mutant.__dict__)
    failed = 0
    for check in CHECKS:
        try:
            check(mutant.measure_interleaved)
        except (AssertionError, ResourceError, ZeroDivisionError):
            failed += 1
    assert failed


def test_drift_of_the_machine_leaves_the_ratio_alone() -> None:
    device = VirtualDevice(drift=0.5)  # twice as slow after two seconds
    calls = [device.call(name, work) for name, work in (("A", 2.0), ("B", 1.0), ("C", 3.0))]
    first, second, third = measure_interleaved(calls, Protocol(), device)
    assert first.variation > 0.1
    assert second.ratio == pytest.approx(0.5, rel=0.03)
    assert third.ratio == pytest.approx(1.5, rel=0.05)
    assert second.stable
    assert not first.stable
    assert first.words.startswith("not stable: blocks vary by ")


def test_a_device_that_always_slows_down_is_refused() -> None:
    device = VirtualDevice(slow=lambda now: frozenset({"thermal limit"}))
    with pytest.raises(ResourceError, match=r"thermal limit.*in 21 of 21 rounds"):
        measure_interleaved([device.call("A", 2.0)], Protocol(), device)


def test_a_slow_network_ends_in_time_and_says_so() -> None:
    device = VirtualDevice(cold_factor=1, first_ms=0)
    (only,) = measure_interleaved([device.call("A", 3000.0)], Protocol(max_s=10), device)
    assert len(only.milliseconds) == 3
    assert only.flags == ("cut short: 3 of 10 blocks",)
    assert device.seconds() < 40


def test_work_that_no_clock_can_tell_is_measured_in_long_blocks() -> None:
    device = VirtualDevice(cold_factor=1, first_ms=0)
    (only,) = measure_interleaved([device.call("A", 1e-9, launch_ms=1e-6)], Protocol(warm_up_s=0), device)
    assert len(only.calls_ms) == 10 * loop.MAX_CALLS_A_BLOCK


def test_progress_is_told_after_every_block() -> None:
    device, told = VirtualDevice(), []
    calls = [device.call("A", 2.0), device.call("B", 1.0)]
    measure_interleaved(calls, Protocol(blocks=5), device, on_block=lambda: told.append(1))
    assert len(told) == 10


def test_a_launch_bound_network_is_flagged() -> None:
    device = VirtualDevice()
    call = device.call("A", 0.1, launch_ms=0.05, kernels=10)
    direct, replayed = measure_interleaved([call, device.capture(call)], Protocol(), device)
    measured = beside_replay(direct, replayed)
    assert measured.replay_ms == pytest.approx(0.1)
    assert measured.launch_bound == pytest.approx(0.8, abs=0.01)  # 0.1 of 0.5 ms
    assert measured.flags == ("launch-bound: the GPU waits for its next kernel 80% of the time",)
    whole = device.call("A", 5.0, kernels=10)
    assert not beside_replay(*measure_interleaved([whole, device.capture(whole)], Protocol(), device)).flags


def test_a_network_that_cannot_be_recorded_is_measured_without_its_replay() -> None:
    class Refusing(VirtualDevice):
        error: Exception

        def capture(self, call: Any) -> Any:
            if call.work_ms == 1.0:
                raise self.error
            return super().capture(call)

    for error, why in (
        (UsageError("it waits"), "not recordable as a CUDA graph: launch-bound share unknown"),
        (ResourceError("full"), "no memory left to record a CUDA graph: launch-bound share unknown"),
    ):
        device = Refusing()
        device.error = error
        calls = [
            device.call("A", 0.5, launch_ms=0.3, kernels=4),
            device.call("B", 1.0),
            device.call("C", 2.0),
        ]
        bound, refused, free = measure_beside_replays(calls, "torch", Protocol(), device)
        assert bound.flags[0].startswith("launch-bound")
        assert refused.flags == (why,)
        assert refused.launch_bound is None
        assert refused.milliseconds == pytest.approx([1.0] * 10, rel=1e-3)
        assert refused.ratio == pytest.approx(1.0 / bound.median_ms)
        assert free.flags == ()
        assert free.replay_ms == pytest.approx(2.0)


def test_only_what_can_be_replayed_is_recorded() -> None:
    device = VirtualDevice()
    (only,) = measure_beside_replays([device.call("A", 2.0)], "tensorrt", Protocol(), device)
    assert only.replay_ms is None
    assert "replay" not in device.log


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(UsageError, match="nothing to measure"):
        measure_interleaved([])


@pytest.mark.parametrize("wrong", [{"blocks": 2}, {"block_s": -1}, {"max_s": float("nan")}, {"threads": 0}])
def test_a_protocol_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Protocol(**wrong)


# --------------------------------------------------------------------------------------- what is reported


def test_percentiles_are_of_the_calls_and_the_median_of_the_blocks() -> None:
    measured = Measurement((1.0, 2.0, 9.0), calls_ms=tuple(range(1, 101)))
    assert (measured.median_ms, measured.p90_ms, measured.p99_ms) == (2.0, 90, 99)
    assert Measurement((1.0, 2.0, 9.0)).p90_ms == 9.0


def test_the_reference_is_judged_by_its_times_and_the_others_by_their_ratios() -> None:
    assert not Measurement((1.0, 1.5, 2.0)).stable
    assert Measurement((1.0, 1.5, 2.0), ratios=(0.5, 0.5, 0.5)).stable
    assert Measurement((1.0, 1.5, 2.0)).ratio is None


def test_a_record_holds_plain_values() -> None:
    import json

    measured = Measurement((1.0, 1.1), calls_ms=(1.0,), ratios=(0.5, 0.6), flags=("x",), fingerprint={"a": 1})
    values = json.loads(json.dumps(measured.as_dict()))
    assert values["milliseconds"] == [1.0, 1.1]
    assert values["ratio"] == pytest.approx(0.55)
    assert values["fingerprint"] == {"a": 1}


# --------------------------------------------------------------------------------------------- on the CPU


def test_one_thread_is_timed_by_its_own_clock_and_several_by_the_walls() -> None:
    for threads, slept_ms in ((1, 0.0), (2, 30.0)):
        device = Cpu(threads)
        before = device.event()
        time.sleep(0.03)
        assert device.elapsed_ms(before, device.event()) == pytest.approx(slept_ms, abs=20)


def test_a_process_that_has_to_wait_for_its_core_says_so() -> None:
    def half_asleep() -> None:
        began = time.process_time()
        while time.process_time() - began < 0.001:
            pass
        time.sleep(0.004)

    (measured,) = measure_interleaved([half_asleep], QUICK)
    assert measured.median_ms == pytest.approx(1.0, rel=0.5)
    assert "the machine was busy" in measured.words


def test_flushing_is_not_taken_for_a_busy_machine() -> None:
    class Flushing(VirtualDevice):
        """A processor: a call and a flush have ended when they return."""

        busy = 1.0

        def event(self) -> float:
            return self.worked_ms

        def _work(self, milliseconds: float) -> None:
            self.worked_ms += milliseconds
            self.wall_ms += milliseconds * self.busy

    device = Flushing(kind="cpu", flush_ms=40.0)
    (only,) = measure_interleaved(
        [device.call("A", 2.0, launch_ms=0)], Protocol(blocks=3), device, flush=True
    )
    assert only.flags == ()
    assert only.wall_ms == pytest.approx([2.0] * 3)
    device.busy = 2.0
    (only,) = measure_interleaved(
        [device.call("A", 2.0, launch_ms=0)], Protocol(blocks=3), device, flush=True
    )
    assert only.wall_ms == pytest.approx([4.0] * 3)
    assert only.words.startswith("the machine was busy: this process had its core 50% of the time")


def test_threads_are_given_back_also_after_a_failure() -> None:
    before = torch.get_num_threads()

    def fails() -> None:
        assert torch.get_num_threads() == before + 1
        raise KeyError

    with pytest.raises(KeyError):
        measure_interleaved([fails], Protocol(threads=before + 1))
    assert torch.get_num_threads() == before
    with pinned_threads(before + 2):
        assert torch.get_num_threads() == before + 2


def test_a_network_with_four_times_the_work_takes_longer() -> None:
    def net(channels: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, channels, 3), nn.Conv2d(channels, channels, 3))

    example = torch.randn(1, 3, 24, 24)
    small, large = (measure(net(channels), example, protocol=QUICK) for channels in (32, 128))
    assert large.median_ms > 2 * small.median_ms
    assert small.fingerprint["input_shapes"] == [[1, 3, 24, 24]]


def test_there_is_no_other_device_to_fall_back_to() -> None:
    for name in ("cuda:99", "cuda:one", "tpu"):
        with pytest.raises(UsageError, match=f"--device {name}: there is no such device"):
            opened(name)
