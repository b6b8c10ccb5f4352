"""How long a network takes: one timing loop for every device and runtime.

Blocks of calls are timed. Where several networks are compared, their blocks take turns (A B C, A B C, …), so
that whatever else the machine does hits all of them, and the ratio to the first within a round is what is
reported: on a loaded machine it moves far less than the times themselves. The first call of every block is
not counted, since it pays for what the network before it left in the caches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from archsearch.errors import ResourceError, UsageError
from archsearch.latency.devices import Call, Device, opened
from archsearch.latency.fingerprint import fingerprint
from archsearch.latency.measurement import DEFAULT, FEWEST_BLOCKS, Measurement, Protocol
from archsearch.latency.runtimes import RUNTIMES, pinned_threads, prepare
from archsearch.latency.statistics import median

__all__ = ["RUNTIMES", "Measurement", "Protocol", "fingerprint", "measure", "measure_interleaved", "prepare"]

LAUNCH_BOUND = 0.1  # share of a call that the GPU waits for its next kernel, from which on it is flagged
BUSY = 0.1  # difference of the processor's clock and the wall's from which on it is flagged
MAX_CALLS_A_BLOCK = 10_000


def measure(
    network: nn.Module | Call,
    example: Any = None,
    runtime: str = "torch",
    device: str | Device = "cpu",
    protocol: Protocol = DEFAULT,
    *,
    dtype: str = "float32",
    channels_last: bool = True,
    flush: bool = False,
) -> Measurement:
    """Measure one network, or a call that ``prepare`` made.

    On a GPU, a network under ``torch`` or ``compile`` is measured as a replayed CUDA graph too, taking turns,
    and one that waits for its launches for more than a tenth of the time is flagged (not with ``flush``,
    which the wall's clock would count there).

    Args:
        network: The network, which is not changed, or a call.
        example: Its input, with the batch.
        runtime: What runs it.
        device: Where.
        protocol: How often and how long.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        channels_last: Whether images and kernels lie in memory channel by channel for each pixel.
        flush: Whether to empty the last-level cache before every call: for a single layer, whose weights
            would never stay there inside a network.

    Raises:
        UsageError: If the runtime, device or dtype cannot be had here, or do not go together.
        ResourceError: If the device slows itself down so often that nothing can be said.
    """
    device = opened(device, protocol.threads)
    conditions = fingerprint(
        runtime, device, dtype, example=example, channels_last=channels_last, threads=protocol.threads
    )
    if not isinstance(network, nn.Module):
        return measure_interleaved([network], protocol, device, flush=flush, fingerprint=conditions)[0]
    call = prepare(
        network,
        example,
        runtime,
        device=device,
        dtype=dtype,
        channels_last=channels_last,
        threads=protocol.threads,
    )
    if flush:
        return measure_interleaved([call], protocol, device, flush=True, fingerprint=conditions)[0]
    return measure_beside_replays([call], runtime, protocol, device, fingerprint=conditions)[0]


def measure_beside_replays(
    calls: Sequence[Call],
    runtime: str,
    protocol: Protocol,
    device: Device,
    *,
    fingerprint: Mapping[str, Any] | None = None,
) -> list[Measurement]:
    """Measure several calls in turn, and with them their replays as CUDA graphs where there are such.

    Args:
        calls: What ``prepare`` made; the first is the reference.
        runtime: That they were prepared for.
        protocol: How often and how long.
        device: Where the calls run.
        fingerprint: Kept with every measurement.

    Raises:
        UsageError: If there are no calls.
        ResourceError: If the device slows itself down so often that nothing can be said.
    """
    if device.kind != "cuda" or not RUNTIMES[runtime].recordable:
        return measure_interleaved(calls, protocol, device, fingerprint=fingerprint)
    recorded = [_recorded(call, device) for call in calls]
    replays = [one for one in recorded if not isinstance(one, str)]
    measured = measure_interleaved([*calls, *replays], protocol, device, fingerprint=fingerprint)
    replayed = iter(measured[len(calls) :])
    return [
        beside_replay(direct, one if isinstance(one, str) else next(replayed))
        for direct, one in zip(measured[: len(calls)], recorded, strict=True)
    ]


def measure_interleaved(
    calls: Sequence[Call],
    protocol: Protocol = DEFAULT,
    device: str | Device = "cpu",
    *,
    flush: bool = False,
    fingerprint: Mapping[str, Any] | None = None,
    on_block: Callable[[], None] = lambda: None,
) -> list[Measurement]:
    """Measure several calls, block by block in turn; the ratio to the first in each round is the result.

    Args:
        calls: What ``prepare`` made; the first is the reference.
        protocol: How often and how long.
        device: Where the calls run.
        flush: Whether to empty the last-level cache before every call.
        fingerprint: Kept with every measurement.
        on_block: Called after every block, for progress.

    Raises:
        UsageError: If there are no calls.
        ResourceError: If the device slows itself down so often that nothing can be said.
    """
    if not calls:
        raise UsageError("nothing to measure: give at least one network")
    device = opened(device, protocol.threads)
    with pinned_threads(protocol.threads), device.current():
        counts = [_warm_up(call, device, protocol) for call in calls]
        rounds, dropped = _rounds(calls, counts, device, protocol, flush, on_block)
    flags = []
    if len(rounds) < protocol.blocks:
        flags.append(f"cut short: {len(rounds)} of {protocol.blocks} blocks")
    if dropped:
        reasons = ", ".join(sorted(set().union(*dropped)))
        flags.append(f"throttled ({reasons}): {len(dropped)} blocks were dropped")
    measured = []
    for place in range(len(calls)):
        blocks = [round_[place] for round_ in rounds]
        share = median([block.mean_ms / block.wall_ms for block in blocks])
        measured.append(
            Measurement(
                milliseconds=tuple(block.mean_ms for block in blocks),
                calls_ms=tuple(ms for block in blocks for ms in block.calls_ms),
                wall_ms=tuple(block.wall_ms for block in blocks),
                ratios=tuple(round_[place].mean_ms / round_[0].mean_ms for round_ in rounds) if place else (),
                flags=(*flags, *(_shared(share, protocol.threads) if device.kind == "cpu" else ())),
                fingerprint=dict(fingerprint or {}),
            )
        )
    return measured


def beside_replay(direct: Measurement, replayed: Measurement | str) -> Measurement:
    """Return a measurement with what the replay of the same network, or the lack of one, says about it."""
    if isinstance(replayed, str):
        flag = f"{replayed}: launch-bound share unknown"
        return replace(direct, flags=(*direct.flags, flag))
    both = replace(direct, replay_ms=replayed.median_ms)
    share = both.launch_bound or 0.0
    if share <= LAUNCH_BOUND:
        return both
    flag = f"launch-bound: the GPU waits for its next kernel {share:.0%} of the time"
    return replace(both, flags=(*both.flags, flag))


# ---------------------------------------------------------------------------------------------- private


def _recorded(call: Call, device: Device) -> Call | str:
    """Return the replay of a call, or why there is none: the call itself can be measured without."""
    try:
        return device.capture(call)
    except ResourceError:
        return "no memory left to record a CUDA graph"
    except UsageError:
        return "not recordable as a CUDA graph"


@dataclass(frozen=True)
class _Block:
    calls_ms: tuple[float, ...]
    wall_ms: float

    @property
    def mean_ms(self) -> float:
        return sum(self.calls_ms) / len(self.calls_ms)


def _warm_up(call: Call, device: Device, protocol: Protocol) -> int:
    """Run until time and calls are enough; return how many calls fill a block."""
    durations: list[float] = []
    began = device.seconds()
    while (warm := device.seconds() - began) < protocol.warm_up_s or len(durations) < protocol.warm_up_calls:
        if warm > max(protocol.max_s, protocol.warm_up_s):
            break  # so slow a network is warm by then
        start = device.event()
        call()
        end = device.event()
        device.synchronise()
        durations.append(device.elapsed_ms(start, end) / 1e3)
    typical = median(durations[len(durations) // 2 :])
    if typical <= 0:  # shorter than the clock can tell
        return MAX_CALLS_A_BLOCK
    return min(max(1, round(protocol.block_s / typical)), MAX_CALLS_A_BLOCK)


def _shared(share: float, threads: int) -> tuple[str, ...]:
    """Say so where the processor's clock and the wall's differ."""
    if threads == 1 and share < 1 - BUSY:
        return (
            f"the machine was busy: this process had its core {share:.0%} of the time, and that is counted",
        )
    if share > 1 + BUSY:
        return ("more than one thread was at work though one was asked for: their times add up",)
    return ()


def _rounds(
    calls: Sequence[Call],
    counts: Sequence[int],
    device: Device,
    protocol: Protocol,
    flush: bool,
    on_block: Callable[[], None],
) -> tuple[list[list[_Block]], list[frozenset[str]]]:
    """Return the rounds that count, and why each of the others does not."""
    rounds: list[list[_Block]] = []
    dropped: list[frozenset[str]] = []
    began = device.seconds()
    while len(rounds) < protocol.blocks:
        late = device.seconds() - began > protocol.max_s * len(calls)
        if (late and len(rounds) >= FEWEST_BLOCKS) or len(dropped) > 2 * protocol.blocks:
            break
        slow = device.slowdowns()
        round_ = []
        for call, count in zip(calls, counts, strict=True):
            round_.append(_block(call, count, device, flush))
            slow |= device.slowdowns()
            on_block()
        if slow:
            dropped.append(slow)
        else:
            rounds.append(round_)
    if len(rounds) < FEWEST_BLOCKS:
        raise ResourceError(
            f"{device.name} slows itself down ({', '.join(sorted(set().union(*dropped)))}) in "
            f"{len(dropped)} of {len(dropped) + len(rounds)} rounds: let it cool, or stop what else it runs"
        )
    return rounds, dropped


def _block(call: Call, count: int, device: Device, flush: bool) -> _Block:
    """Time ``count`` calls, after one that is not counted; wait for the device once, at the end.

    Nothing is under way when a block starts, since the warm-up and the block before it have waited. The
    wall's time is without the flushing where that has ended when it returns, as on a CPU.
    """
    marks = []
    began = device.seconds()
    for _ in range(count + 1):
        if flush:
            emptying = device.seconds()
            device.flush()
            began += device.seconds() - emptying
        start = device.event()
        call()
        marks.append((start, device.event()))
    device.synchronise()
    wall_ms = (device.seconds() - began) * 1e3 / (count + 1)
    return _Block(tuple(device.elapsed_ms(*pair) for pair in marks[1:]), wall_ms)
