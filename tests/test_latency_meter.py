from __future__ import annotations

import pytest
from virtual_device import VirtualDevice

from archsearch.latency import meter as module
from archsearch.latency.measure import Protocol
from archsearch.latency.meter import RuntimeMeter, Settings


def metered(monkeypatch: pytest.MonkeyPatch, device: VirtualDevice, runtime: str = "torch") -> RuntimeMeter:
    monkeypatch.setattr(module, "opened", lambda name, threads: device)
    return RuntimeMeter(Settings(device="cuda", runtime=runtime))


def test_a_processor_is_warm_at_once_and_a_gpu_is_not() -> None:
    assert Settings().cells == Protocol(0.01, 5, 10, 0.005, 2.0, 1)
    assert Settings().networks == Protocol(0.1, 5, 10, 0.04, 5.0, 1)
    for protocol in (Settings(device="cuda:1").cells, Settings(device="cuda:1").networks):
        assert (protocol.warm_up_s, protocol.warm_up_calls) == (0.2, 10)


def test_on_a_gpu_cells_are_measured_cold_and_networks_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    device = VirtualDevice()
    meter = metered(monkeypatch, device)
    calls = [device.call("A", 2.0), device.call("B", 1.0)]
    times = meter.measure(calls, Settings(device="cuda").cells)
    assert times == [pytest.approx([2.0] * 10), pytest.approx([1.0] * 10)]
    assert device.flushes
    assert "replay" not in device.log
    device.flushes = 0
    times = meter.measure(calls, Settings(device="cuda").networks)
    assert times == [pytest.approx([2.0] * 10), pytest.approx([1.0] * 10)]
    assert not device.flushes
    assert "replay" in device.log
    assert not meter.flags


def test_what_must_be_said_of_measurements_is_counted_by_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    device = VirtualDevice(slow=lambda now: frozenset({"thermal limit"} if 0.5 < now < 0.7 else ()))
    meter = metered(monkeypatch, device)
    bound, slow = device.call("A", 0.2, launch_ms=0.1, kernels=4), device.call("B", 3000.0)
    for _ in range(2):
        meter.measure([bound], Settings(device="cuda").networks)
    assert meter.flags == {"launch-bound": 2, "throttled (thermal limit)": 1}
    meter.measure([slow, bound], Settings(device="cuda").networks)
    assert meter.flags == {"launch-bound": 3, "throttled (thermal limit)": 1, "cut short": 2}
