"""Several architectures side by side with their reference, measured in turn."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from archsearch.architecture import Architecture
from archsearch.cost import Cost
from archsearch.errors import UsageError
from archsearch.latency.devices import Device, opened
from archsearch.latency.fingerprint import fingerprint
from archsearch.latency.measure import measure_beside_replays
from archsearch.latency.measurement import DEFAULT, Measurement, Protocol
from archsearch.latency.runtimes import DTYPES, RUNTIMES, check, prepare
from archsearch.pictures import pyplot
from archsearch.rebuild import Traced, build_fresh, trace_architecture

SETTLING_BATCH = 8


@dataclass(frozen=True)
class Entry:
    """One network of the comparison.

    Attributes:
        name: The end of the file's path, or ``"reference"``.
        key: Of the architecture; ``None`` for the reference.
        macs: Multiply-adds of one input.
        params: Parameters.
        memory_bytes: Weights and the activations that are needed at once, of the whole batch.
        memory_measured: Whether the device counted what a call takes; else it is computed from the shapes.
        batch: Inputs of a call.
        measurement: What a call took.
    """

    name: str
    key: str | None
    macs: int
    params: int
    memory_bytes: int
    memory_measured: bool
    batch: int
    measurement: Measurement

    @property
    def throughput(self) -> float:
        """Inputs a second."""
        return self.batch / self.measurement.median_ms * 1e3


@dataclass(frozen=True)
class Bench:
    """The networks, the reference first, and under which conditions they were measured."""

    conditions: Mapping[str, Any]
    entries: Sequence[Entry]

    def table(self) -> list[list[str]]:
        """Return the header and one row a network, as people read them."""
        reference = self.entries[0]
        return [list(COLUMNS), *(_row(entry, reference) for entry in self.entries)]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, the blocks of every network among them."""
        return {
            "conditions": dict(self.conditions),
            "networks": [
                {
                    **{name: value for name, value in vars(entry).items() if name != "measurement"},
                    "throughput": entry.throughput,
                    **entry.measurement.as_dict(),
                }
                for entry in self.entries
            ],
        }


COLUMNS = (
    "network",
    "ms",
    "of reference",
    "95 %",
    "p99 ms",
    "inputs/s",
    "memory MB",
    "MACs kept",
    "params kept",
)


def bench(
    paths: Sequence[Path],
    *,
    runtime: str = "torch",
    device: str | Device = "cpu",
    dtype: str = "float32",
    batch: int = 1,
    channels_last: bool = True,
    protocol: Protocol = DEFAULT,
    trust_code: bool = False,
    conditions: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Bench:
    """Measure architectures beside the reference that they were all found in.

    The weights are fresh, which takes as long as trained ones: a runtime does not look at their values.

    Args:
        paths: Architecture files of one reference.
        runtime: What runs them.
        device: Where.
        dtype: Of weights and inputs.
        batch: Inputs of a call.
        channels_last: Whether kernels and images lie channels innermost.
        protocol: How often and how long.
        trust_code: Whether a model that names the user's own code may be imported.
        conditions: Kept with the result.
        say: Takes lines for the user.

    Raises:
        UsageError: If the files are of several references, or the runtime cannot be had here.
        SpecError: If a file is wrong.
        ResourceError: If the device slows itself down so often that nothing can be said.
    """
    if batch < 1:
        raise UsageError(f"--batch {batch}: at least 1")
    device = opened(device, protocol.threads)
    check(runtime, device, dtype)
    found = _networks(paths, trust_code)
    shape = found[0].traced.input_shape
    example = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))
    calls, memory = [], []
    for network in found:
        say(f"{network.name}: prepares {runtime}")
        call = prepare(
            settled(network.build(), shape),
            example,
            runtime,
            device=device,
            dtype=dtype,
            channels_last=channels_last,
            threads=protocol.threads,
        )
        calls.append(call)
        memory.append(device.working_bytes(call) if RUNTIMES[runtime].counted else None)
    say(f"measures {len(calls)} networks in turn, {protocol.blocks} blocks each")
    facts = fingerprint(
        runtime, device, dtype, example=example, channels_last=channels_last, threads=protocol.threads
    )
    measured = measure_beside_replays(calls, runtime, protocol, device, fingerprint=facts)
    entries = [
        Entry(
            network.name,
            network.key,
            network.cost.macs,
            network.cost.params,
            computed_bytes(network.cost, batch, dtype)
            if counted is None
            else counted + (network.cost.params + example.numel()) * DTYPES[dtype].itemsize,
            counted is not None,
            batch,
            measurement,
        )
        for network, counted, measurement in zip(found, memory, measured, strict=True)
    ]
    return Bench({**(conditions or {}), "protocol": asdict(protocol), "fingerprint": facts}, entries)


def settled(model: nn.Module, input_shape: Sequence[int]) -> nn.Module:
    """Return a copy whose batch norms have seen one random batch.

    A fresh network in eval mode normalises nothing: over fifty layers its activations grow or fade until they
    overflow in half precision or become numbers that a processor computes slowly with.
    """
    model = copy.deepcopy(model)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = None
        norm.reset_running_stats()
    if norms:
        with torch.no_grad():
            model.train()(
                torch.randn(SETTLING_BATCH, *input_shape, generator=torch.Generator().manual_seed(1))
            )
    return model.eval()


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return as much of the end of each path as tells it from the others."""
    parts = [path.absolute().parts for path in paths]
    length = 1
    while len({each[-length:] for each in parts}) < len(set(parts)):
        length += 1
    return ["/".join(each[-length:]) for each in parts]


def computed_bytes(cost: Cost, batch: int, dtype: str) -> int:
    """Return the bytes of the weights and of the activations that are needed at once."""
    size = DTYPES[dtype].itemsize
    return cost.params * size + cost.peak_activation_bytes * batch * size // torch.float32.itemsize


def draw(bench: Bench, path: Path) -> None:
    """Draw a bar of the latency of each network, the reference first, with its share of the reference's.

    Raises:
        UsageError: If matplotlib is not installed.
    """
    plots = pyplot()
    entries = bench.entries
    times = [entry.measurement.median_ms for entry in entries]
    with plots.rc_context({"font.size": 9}):
        figure, axes = plots.subplots(figsize=(7, 0.5 * len(entries) + 1.4), layout="constrained")
        places = range(len(entries))
        axes.barh(places, times, color=["#d9dee3"] + ["#2f6f9f"] * (len(entries) - 1), height=0.7)
        for place, entry in zip(places, entries, strict=True):
            ratio = entry.measurement.ratio
            share = "" if ratio is None else f"  ({ratio:.3f} of the reference)"
            axes.text(times[place], place, f" {times[place]:.3g} ms{share}", va="center")
        axes.set_yticks(places, [entry.name for entry in entries])
        axes.invert_yaxis()
        axes.set_xlim(0, max(times) * 1.8)
        axes.set_xlabel("milliseconds of a call")
        facts = bench.conditions["fingerprint"]
        title = f"{facts['runtime']} on {facts['accelerator']}, {facts['dtype']}, batch {facts['batch']}"
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=150)
        plots.close(figure)


# ---------------------------------------------------------------------------------------------- private


@dataclass(frozen=True)
class _Network:
    name: str
    traced: Traced
    architecture: Architecture | None = None

    @property
    def key(self) -> str | None:
        return self.architecture.key if self.architecture else None

    @property
    def cost(self) -> Cost:
        if self.architecture is None:
            return self.traced.cost.reference
        return self.traced.cost.of({name: group.width for name, group in self.architecture.widths.items()})

    def build(self) -> nn.Module:
        return build_fresh(self.traced, self.architecture) if self.architecture else self.traced.model


def _networks(paths: Sequence[Path], trust_code: bool) -> list[_Network]:
    """Read the files; return their reference and their networks."""
    if not paths:
        raise UsageError("nothing to measure: give at least one architecture file")
    architectures = [Architecture.read(path) for path in paths]
    first = architectures[0]
    found = []
    for path, name, architecture in zip(paths, short_names(paths), architectures, strict=True):
        if _origin(architecture) != _origin(first):
            raise UsageError(
                f"{path} is a {architecture.model} and {paths[0]} a {first.model}, or their arguments or "
                "input shapes differ: compare architectures of one reference"
            )
        traced = trace_architecture(architecture, trust_code=trust_code, where=str(path))
        found.append(_Network(name, traced, architecture))
    return [_Network("reference", found[0].traced), *found]


def _origin(architecture: Architecture) -> tuple[Any, ...]:
    return architecture.model, dict(architecture.arguments), tuple(architecture.input_shape)


def _row(entry: Entry, reference: Entry) -> list[str]:
    measured = entry.measurement
    interval = measured.ratio_interval
    return [
        entry.name,
        f"{measured.median_ms:.4g}",
        "1" if measured.ratio is None else f"{measured.ratio:.4f}",
        "" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}",
        f"{measured.p99_ms:.4g}",
        f"{entry.throughput:,.0f}",
        f"{entry.memory_bytes / 1e6:.1f}",
        f"{entry.macs / reference.macs:.4f}",
        f"{entry.params / reference.params:.4f}",
    ]
