"""What runs a network: torch itself, compiled, replayed as a CUDA graph, or another engine.

A runtime takes a network that is ready (its own copy in eval mode, on the device, in its dtype and layout)
and returns a call that runs it once: on a CPU the call returns when it is done, on a GPU it may return
before.
"""

from __future__ import annotations

import contextlib
import copy
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils import _pytree as pytree

from archsearch.errors import UsageError
from archsearch.latency.devices import Call, Device, opened
from archsearch.registry import Registry
from archsearch.tracing import call_model

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Setting:
    """What a runtime is told beside the network and its input.

    Attributes:
        device: Where.
        dtype: Of weights and inputs.
        threads: Of the CPU.
    """

    device: Device
    dtype: str
    threads: int


Start: TypeAlias = Callable[[nn.Module, Any, Setting], Call]


@dataclass(frozen=True)
class Runtime:
    """One way to run networks.

    Attributes:
        start: Makes the call from a network that is ready, its input and the setting.
        dtypes: What it runs on each kind of device.
        packages: Modules that it needs beside torch; the extra of its own name installs them.
        distributions: Whose versions decide its speed.
        own_layout: Whether it decides itself how tensors lie in memory.
        counted: Whether each call takes its memory from torch, which counts it on a GPU.
        recordable: Whether its calls can be recorded as a CUDA graph.
    """

    start: Start
    dtypes: Mapping[str, tuple[str, ...]]
    packages: tuple[str, ...] = ()
    distributions: tuple[str, ...] = ("torch",)
    own_layout: bool = False
    counted: bool = False
    recordable: bool = False


RUNTIMES: Registry[Runtime] = Registry("runtime")


def runtime(name: str, **facts: Any) -> Callable[[Start], Start]:
    """Return a decorator that registers a function as the ``start`` of a runtime."""

    def add(start: Start) -> Start:
        RUNTIMES.register(name)(Runtime(start, **facts))
        return start

    return add


def prepare(
    model: nn.Module,
    example: Any,
    runtime: str = "torch",
    *,
    device: str | Device = "cpu",
    dtype: str = "float32",
    channels_last: bool = True,
    threads: int = 1,
) -> Call:
    """Return a call that runs a network once; it has run once already, so that nothing is left to compile.

    torch's own number of threads is set by whoever times the call (``measure_interleaved``); runtimes with
    threads of their own get ``threads`` here.

    Args:
        model: The network; it is copied, not changed.
        example: Its input, with the batch: a tensor, a tuple of positional or a mapping of named arguments.
        runtime: A name of ``RUNTIMES``.
        device: Where to run.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``: of weights and of inputs that are no integers.
        channels_last: Whether kernels and images lie channels innermost; a runtime may know better.
        threads: Of the CPU.

    Raises:
        UsageError: If runtime, device and dtype do not go together or something is not installed.
    """
    chosen, device = RUNTIMES[runtime], opened(device)
    check(runtime, device, dtype)
    setting = Setting(device, dtype, threads)
    model = copy.deepcopy(model).eval().requires_grad_(False)
    layout = torch.channels_last if channels_last and not chosen.own_layout else torch.contiguous_format

    def placed(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        value = value.detach().to(device_of(device))
        if value.is_floating_point():
            value = value.to(DTYPES[dtype])
        return value.contiguous(memory_format=layout) if value.ndim == 4 else value.contiguous()

    with pinned_threads(threads), device.current():
        model.to(device=device_of(device), dtype=DTYPES[dtype])
        if all(parameter.ndim != 5 for parameter in model.parameters()):  # there is no such layout of volumes
            model.to(memory_format=layout)
        call = chosen.start(model, pytree.tree_map(placed, example), setting)
        call()
        device.synchronise()
    return call


@contextlib.contextmanager
def pinned_threads(threads: int) -> Iterator[None]:
    """Let torch use so many threads of the CPU; give back as many as it had."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check(runtime: str, device: Device, dtype: str) -> None:
    """Check that a runtime can run on a device with a dtype, before anything long starts.

    Raises:
        UsageError: If not; says what would do.
    """
    chosen = RUNTIMES[runtime]
    if device.kind not in chosen.dtypes:
        raise UsageError(
            f"--runtime {runtime}: does not run on {device.kind}: give --device {' or '.join(chosen.dtypes)}"
        )
    if dtype not in chosen.dtypes[device.kind]:
        raise UsageError(
            f"--dtype {dtype}: {runtime} on {device.kind} runs {', '.join(chosen.dtypes[device.kind])}"
        )
    missing = [package for package in chosen.packages if find_spec(package) is None]
    if missing:
        raise UsageError(
            f"--runtime {runtime}: needs {', '.join(missing)}: pip install 'archsearch[{runtime}]'"
        )


def device_of(device: Device) -> torch.device:
    """Return torch's own device."""
    return torch.device(device.name)


# ---------------------------------------------------------------------------------------- torch's own

_ALL = ("float32", "bfloat16", "float16")
_COMPILER = (
    "--runtime compile: torch.compile cannot build here ({reason}): on a CPU it needs a C++ compiler and"
    " Python's headers (apt install g++ python3-dev), on a GPU Triton"
)


@runtime("torch", dtypes={"cpu": _ALL, "cuda": _ALL}, counted=True, recordable=True)
def eager(model: nn.Module, example: Any, setting: Setting) -> Call:
    """Run torch's kernels one after the other, as most scripts do."""

    def call() -> None:
        with torch.inference_mode():
            call_model(model, example)

    return call


@runtime("compile", dtypes={"cpu": _ALL, "cuda": _ALL}, counted=True, recordable=True)
def compiled(model: nn.Module, example: Any, setting: Setting) -> Call:
    """Run what ``torch.compile`` makes of the network, for exactly this shape.

    Raises:
        UsageError: If nothing can be compiled here.
    """
    from torch._dynamo import config
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    def run() -> Any:
        return call_model(model, example)  # without the outputs the compiler would drop the whole network

    # torch remembers what it compiled for each code object and gives up, silently, after eight networks of
    # the same code; a code object of its own lets every network start afresh.
    own = types.FunctionType(
        run.__code__.replace(), run.__globals__, "run", run.__defaults__, run.__closure__
    )
    fast = torch.compile(own, dynamic=False)

    def call() -> None:
        with torch.inference_mode():
            fast()

    try:
        with config.patch(fail_on_recompile_limit_hit=True):
            call()
    except (BackendCompilerFailed, CppCompileError, InvalidCxxCompiler) as error:
        raise UsageError(_COMPILER.format(reason=str(error).strip().splitlines()[0][:200])) from error
    return call


@runtime("cudagraph", dtypes={"cuda": _ALL})
def cudagraph(model: nn.Module, example: Any, setting: Setting) -> Call:
    """Replay torch's kernels as one CUDA graph: what they take when none waits to be launched.

    Raises:
        UsageError: If the network cannot be recorded.
        ResourceError: If there is no memory left for it.
    """
    return setting.device.capture(eager(model, example, setting))
