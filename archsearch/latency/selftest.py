"""Whether this machine can be timed: checks that find a wrong clock, a missing wait or a wrong unit."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from archsearch.latency.devices import Call, Cuda, Device, opened
from archsearch.latency.measure import measure_interleaved
from archsearch.latency.measurement import DEFAULT, Measurement, Protocol
from archsearch.latency.runtimes import pinned_threads
from archsearch.latency.statistics import median

AGREE = 0.1  # largest difference between two ways to time the same
SAME = 0.02  # the same of a call and itself, taking turns
_SIZES = {"cpu": 192, "cuda": 4096}  # of square matrices whose product takes some tenths of a millisecond


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: What was looked at.
        ok: Whether it is as it must be.
        words: What was found.
    """

    name: str
    ok: bool
    words: str


def selftest(device: str | Device = "cpu", protocol: Protocol = DEFAULT) -> Iterator[Check]:
    """Check clock, scale and agreement with other timers on a device; yield each finding.

    Raises:
        UsageError: If there is no such device.
        ResourceError: If it slows itself down so often that nothing can be said.
    """
    device = opened(device, protocol.threads)
    once, twice, four_times = (_products(device, count) for count in (1, 2, 4))
    yield check_clock(device)
    measured = measure_interleaved([once, twice, four_times, once], protocol, device)
    yield check_scale(measured[:3])
    yield check_same(measured[3])
    with pinned_threads(protocol.threads), device.current():
        yield check_timer(device, four_times, median(measured[2].wall_ms))
        if device.kind == "cuda":
            yield from _checks_of_cuda(device, four_times, measured[2], protocol)


def check_clock(device: Device) -> Check:
    """Check that the device's clock runs as fast as the wall's, over 50 ms of waiting with a busy core."""
    before = device.event()
    began = time.perf_counter()
    while time.perf_counter() - began < 0.05:
        pass
    after = device.event()
    wall_ms = (time.perf_counter() - began) * 1e3
    device.synchronise()
    elapsed_ms = device.elapsed_ms(before, after)
    share = elapsed_ms / wall_ms
    return Check(
        "clock",
        abs(share - 1) < AGREE,
        f"{wall_ms:.1f} ms on the wall are {elapsed_ms:.1f} ms on the device's clock ({share:.2f})"
        + ("; the machine is busy with something else" if share < 1 - AGREE else ""),
    )


def check_scale(measured: list[Measurement]) -> Check:
    """Check that two and four times the work take two and four times as long."""
    two, four = (each.ratio or 0.0 for each in measured[1:3])
    ok = abs(two / 2 - 1) < AGREE and abs(four / 4 - 1) < AGREE
    return Check("scale", ok, f"1, 2 and 4 matrix products take 1 : {two:.2f} : {four:.2f}")


def check_same(again: Measurement) -> Check:
    """Check that a call takes as long as itself, taking turns."""
    ratio = again.ratio or 0.0
    return Check(
        "noise",
        abs(ratio - 1) < SAME,
        f"the same call twice, taking turns: ratio {ratio:.4f}, blocks vary by {again.variation:.1%}"
        + (f" ({again.words})" if again.words else ""),
    )


def check_timer(device: Device, call: Call, wall_ms: float) -> Check:
    """Compare with ``torch.utils.benchmark``, which waits for the device and knows the wall's clock only."""
    from torch.utils.benchmark import Timer

    def timed() -> None:
        call()
        device.synchronise()

    theirs_ms = (
        Timer("timed()", globals={"timed": timed}, num_threads=1).blocked_autorange(min_run_time=0.5).median
        * 1e3
    )
    return _agreement("torch.utils.benchmark", wall_ms, theirs_ms)


def _checks_of_cuda(device: Device, call: Call, measured: Measurement, protocol: Protocol) -> Iterator[Check]:
    cold = measure_interleaved([call], protocol, device, flush=True)[0]
    try:
        from triton.testing import do_bench
    except ImportError:
        yield Check("triton.testing.do_bench", True, "Triton is not installed: not compared")
    else:
        yield _agreement("triton.testing.do_bench", cold.median_ms, do_bench(call, return_mode="median"))
    replayed = measure_interleaved([device.capture(call)], protocol, device)[0]
    yield _agreement("replay of a CUDA graph", measured.median_ms, replayed.median_ms)
    watching = isinstance(device, Cuda) and device.watching
    yield Check(
        "throttling",
        watching,
        "the driver says when the GPU slows down"
        if watching
        else "nobody says when the GPU slows down: pip install 'archsearch[gpu]'",
    )


def _agreement(name: str, ours_ms: float, theirs_ms: float) -> Check:
    ok = abs(ours_ms / theirs_ms - 1) < AGREE
    return Check(name, ok, f"{ours_ms:.4g} ms here, {theirs_ms:.4g} ms there ({ours_ms / theirs_ms:.3f})")


def _products(device: Device, count: int) -> Call:
    """Return a call of so many matrix products one after the other."""
    size = _SIZES[device.kind]
    left = torch.ones(size, size, device=device.name)
    out = torch.empty_like(left)

    def call() -> None:
        for _ in range(count):
            torch.mm(left, left, out=out)

    return call
