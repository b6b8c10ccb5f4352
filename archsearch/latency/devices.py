"""What is timed, behind one small interface: the clock, the events, and what a device tells about itself.

The timing loop of ``measure`` knows nothing else, so that a stand-in with a virtual clock can prove it
without an accelerator. Nothing here changes clocks, power limits or any other setting of a device.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, Protocol

import torch

from archsearch.errors import ResourceError, UsageError
from archsearch.latency import processor
from archsearch.latency.watch import ClockWatch

Call = Callable[[], None]


class Device(Protocol):
    """Where a network runs, as the timing loop sees it.

    ``seconds`` is the wall's clock and says how long a program waits; ``event`` and ``elapsed_ms`` are the
    device's own, and say how long it worked for us.

    Attributes:
        name: As torch calls it, such as ``"cpu"`` or ``"cuda:0"``.
        kind: ``"cpu"`` or ``"cuda"``.
    """

    name: str
    kind: str

    @property
    def tf32(self) -> bool:
        """Whether float32 convolutions are computed in TF32; every runtime is told the same."""

    def current(self) -> AbstractContextManager[None]:
        """Make the device and its stream of work those that torch and the engines take by themselves."""

    def seconds(self) -> float:
        """Return the wall's clock."""

    def synchronise(self) -> None:
        """Wait until everything that was started has ended."""

    def event(self) -> Any:
        """Mark the present place in the device's stream of work; return the mark."""

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Return the device's time between two marks, once both were reached."""

    def flush(self) -> None:
        """Start what drives the data of earlier calls out of the last-level cache."""

    def slowdowns(self) -> frozenset[str]:
        """Return why the device runs slower than it could right now; empty where it does not."""

    def capture(self, call: Call) -> Call:
        """Record what a call starts; return a call that replays it as one, and keeps alive what it needs.

        Raises:
            UsageError: If the device cannot, or the call does what cannot be recorded.
            ResourceError: If there is no memory left for it.
        """

    def working_bytes(self, call: Call) -> int | None:
        """Return the most that a call takes beside what torch holds; ``None`` where nobody counts it."""

    def facts(self) -> dict[str, Any]:
        """Return what tells this device from another, and what its speed depends on."""


class Cpu:
    """The processor that this process runs on.

    Its own clock is the processor time of this process as long as that runs on one thread: it stands still
    while the system gives the core to somebody else. Measured with four processes a core, the ratio of a
    network to itself had a deviation of 1 % on this clock and of 2 to 8 % on the wall's. With several threads
    their times would add up, and the clock is the wall's.

    Args:
        threads: That the network uses.
    """

    name = kind = "cpu"
    tf32 = False

    def __init__(self, threads: int = 1) -> None:
        self._clock = time.process_time if threads == 1 else time.perf_counter
        self._cache: torch.Tensor | None = None

    def current(self) -> AbstractContextManager[None]:
        """Do nothing: there is one, and it works in the order of the calls."""
        return contextlib.nullcontext()

    def seconds(self) -> float:
        """Return the wall's clock."""
        return time.perf_counter()

    def synchronise(self) -> None:
        """Return at once: a call on the CPU has ended when it returns."""

    def event(self) -> float:
        """Return the processor's clock."""
        return self._clock()

    def elapsed_ms(self, start: float, end: float) -> float:
        """Return the time between two readings of the clock."""
        return (end - start) * 1e3

    def flush(self) -> None:
        """Write more bytes than the last-level cache of a common processor holds."""
        if self._cache is None:
            self._cache = torch.empty(_CPU_CACHE_BYTES, dtype=torch.int8)
        self._cache.zero_()

    def slowdowns(self) -> frozenset[str]:
        """Return nothing: a processor does not say so without special rights; the interleaving answers it."""
        return frozenset()

    def capture(self, call: Call) -> Call:
        """Refuse: there are no graphs of a CPU.

        Raises:
            UsageError: Always.
        """
        raise UsageError("--runtime cudagraph: replays CUDA graphs: give --device cuda, or another runtime")

    def working_bytes(self, call: Call) -> int | None:
        """Return nothing: torch does not count its memory on a CPU."""
        return None

    def facts(self) -> dict[str, Any]:
        """Return the processor's name and revision, and its widest vector instructions."""
        return {**processor.facts(), "capability": torch.backends.cpu.get_cpu_capability()}


class Cuda:
    """One GPU of this machine, and one stream of it in which everything is prepared and measured.

    It is not the default stream: there TensorRT adds waits to every call, and ONNX Runtime takes it for none
    at all, since its handle is 0, and works in one of its own that our events do not see. ``opened`` gives
    every caller the same object, and so the same stream.

    Args:
        index: Which one, as torch counts.
        watch: Tells when the GPU slows down, and its power limit.
    """

    kind = "cuda"

    def __init__(self, index: int, watch: ClockWatch) -> None:
        self.name = f"cuda:{index}"
        self._index = index
        self._watch = watch
        self._stream = torch.cuda.Stream(index)
        self._cache: torch.Tensor | None = None

    @property
    def tf32(self) -> bool:
        """Whether float32 convolutions are computed in TF32: torch's default, from Ampere on."""
        asked: bool = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
        return asked and torch.cuda.get_device_properties(self._index).major >= 8

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Make the GPU and its stream torch's current ones, after what the caller's stream has under way."""
        self._stream.wait_stream(torch.cuda.current_stream(self._index))
        with torch.cuda.device(self._index), torch.cuda.stream(self._stream):
            yield

    @property
    def watching(self) -> bool:
        """Whether the driver tells when the GPU slows down."""
        return self._watch.watching

    def seconds(self) -> float:
        """Return the wall's clock."""
        return time.perf_counter()

    def synchronise(self) -> None:
        """Wait for all streams of the GPU."""
        torch.cuda.synchronize(self._index)

    def event(self) -> torch.cuda.Event:
        """Record an event in the stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def elapsed_ms(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Return the GPU's time between two events."""
        return float(start.elapsed_time(end))

    def flush(self) -> None:
        """Write twice the size of the second-level cache."""
        if self._cache is None:
            size = 2 * torch.cuda.get_device_properties(self._index).L2_cache_size
            self._cache = torch.empty(size, dtype=torch.int8, device=self.name)
        self._cache.zero_()

    def slowdowns(self) -> frozenset[str]:
        """Return the reasons that the driver names for clocks below the highest."""
        return self._watch.slowdowns()

    def capture(self, call: Call) -> Call:
        """Record a call as a CUDA graph, after three calls in the same stream as torch asks for.

        A graph knows tensors by their addresses alone, so that the call, which owns weights and input, is
        kept with it. The stream is one of its own: where the recording breaks off, only that is left broken.

        Raises:
            UsageError: If the call waits for the GPU or allocates outside of torch.
            ResourceError: If the GPU's memory does not suffice.
        """
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self._index)
        try:
            with self.current():
                stream.wait_stream(self._stream)
                with torch.cuda.stream(stream):
                    for _ in range(3):
                        call()
                    with torch.cuda.graph(graph, stream=stream):
                        call()
                self._stream.wait_stream(stream)
        except RuntimeError as error:
            first = error.__context__ or error  # the end of a broken recording fails once more, and says less
            if any(isinstance(each, torch.OutOfMemoryError) for each in (first, error)):
                raise ResourceError(
                    f"{self.name}: no memory is left to record the network as a CUDA graph: give a smaller"
                    " --batch"
                ) from error
            raise UsageError(
                f"the network cannot be recorded as a CUDA graph ({first_line(first)}):"
                " give --runtime torch or compile"
            ) from error
        return holding(graph.replay, graph, call)

    def working_bytes(self, call: Call) -> int | None:
        """Return the most that torch's allocator gave out while a call ran, beside what it had before."""
        with self.current():
            self.synchronise()
            before = torch.cuda.memory_allocated(self._index)
            torch.cuda.reset_peak_memory_stats(self._index)
            call()
            self.synchronise()
        return torch.cuda.max_memory_allocated(self._index) - before

    def facts(self) -> dict[str, Any]:
        """Return the GPU's name, its compute capability, the driver and libraries, and its power limit."""
        properties = torch.cuda.get_device_properties(self._index)
        return {
            "accelerator": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "tf32": self.tf32,
            **self._watch.facts(),
        }


def opened(device: str | torch.device | Device, threads: int = 1) -> Device:
    """Return the device called ``"cpu"``, ``"cuda"`` or ``"cuda:1"``; one that is open already as it is.

    Args:
        device: Its name, or the device.
        threads: Of the CPU, that the networks will use.

    Raises:
        UsageError: If there is no such device here. Nothing falls back to the CPU.
    """
    if not isinstance(device, (str, torch.device)):
        return device
    name = str(device)
    if name == "cpu":
        return Cpu(threads)
    present = torch.cuda.device_count()
    kind, _, number = name.partition(":")
    index = int(number) if number.isdecimal() else 0
    if kind != "cuda" or (number and not number.isdecimal()) or index >= present:
        names = ", ".join(["cpu", *(f"cuda:{each}" for each in range(present))])
        raise UsageError(f"--device {name}: there is no such device to measure on here; give one of {names}")
    return _cuda(index)


def holding(call: Call, *things: object) -> Call:
    """Return a call that keeps alive what an engine or a graph knows by its address alone."""

    def held() -> None:
        call()

    held.things = things  # type: ignore[attr-defined]
    return held


def first_line(error: BaseException) -> str:
    """Return what an engine's error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@cache
def _cuda(index: int) -> Cuda:
    """Return the one object of a GPU: what was prepared in its stream is measured in it."""
    return Cuda(index, ClockWatch.of_cuda(index))


_CPU_CACHE_BYTES = 256 * 2**20
