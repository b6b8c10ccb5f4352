"""Latency targets: what a device's table predicts, and what the found network takes when it is measured."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from archsearch import files
from archsearch.architecture import Architecture
from archsearch.cost import CostModel, Latency
from archsearch.errors import ArchsearchError, SpecError, UsageError
from archsearch.latency.devices import opened
from archsearch.latency.fingerprint import differences
from archsearch.latency.library import own_table
from archsearch.latency.measure import fingerprint
from archsearch.latency.meter import Settings
from archsearch.latency.runtimes import check
from archsearch.latency.table import LatencyTable
from archsearch.rebuild import Traced
from archsearch.space import Bounds, SearchSpace
from archsearch.targets import Target
from archsearch.training.evaluation import resolve_device

PROCESSES = 3  # fresh ones: memory and caches lie differently in each
_CONDITIONS = ("runtime", "device", "dtype", "batch", "threads", "channels_last")
_TIMES = ("predicted_ms", "low_ms", "high_ms", "reference_ms")


@dataclass(frozen=True)
class Device:
    """Whose latency counts.

    Attributes:
        table: What was measured on it.
        here: Whether it is this machine, so that what is found can be measured.
    """

    table: LatencyTable
    here: bool


def device_of(
    latency: object,
    table: str | Path | None,
    other_device: bool = False,
    *,
    runtime: str | Mapping[str, Any] | None = None,
    traced: Traced | None = None,
    device: str = "auto",
    store: Path = Path("runs"),
    say: Callable[[str], None] = lambda line: None,
) -> Device | None:
    """Return the device that a latency target is about; ``None`` where there is none.

    Args:
        latency: The target, if any.
        table: File of the device's table.
        other_device: Whether it may be another one than this.
        runtime: In place of a table: what runs the network on this machine, by name or with other fields of
            ``Settings``. Its table is in the store, or is measured now.
        traced: The network that is to run.
        device: Of this machine, with a runtime.
        store: Where this machine's tables are, under ``latency``.
        say: Takes lines for the user.

    Raises:
        UsageError: If target, table and runtime do not go together, or the table was measured elsewhere.
    """
    if table is not None and runtime is not None:
        raise UsageError("--table and --runtime exclude each other: a table knows what it was measured with")
    if (latency is None) != (table is None and runtime is None):
        raise UsageError(
            "--latency goes with --table FILE, which says how long widths take, or with --runtime NAME, to "
            "have that measured here"
        )
    if runtime is not None and traced is not None:
        settings = _settings(runtime, device)
        return Device(own_table(traced, allowed_of(traced), settings, store / "latency", say=say), here=True)
    if table is None:
        return None
    read = LatencyTable.read(table)
    away = elsewhere(read)
    if away and not other_device:
        raise UsageError(
            f"{table} was measured elsewhere ({away}): profile this device, or give --other-device"
        )
    return Device(read, here=not away)


def allowed_of(traced: Traced) -> Callable[[int], Mapping[str, Any]]:
    """Return what gives the widths that a table of a network knows, by its quantum."""
    return lambda quantum: SearchSpace(Bounds(round_to=quantum)).allowed(traced.graph)


def _settings(runtime: str | Mapping[str, Any], device: str) -> Settings:
    """Return how to measure on this machine."""
    words = {"runtime": runtime} if isinstance(runtime, str) else dict(runtime)
    unknown = sorted(words.keys() - {field.name for field in fields(Settings)})
    if unknown or "runtime" not in words:
        raise UsageError(f"runtime: {', '.join(unknown) or 'no name'}: give a name, or fields of Settings")
    settings = Settings(**{"device": str(resolve_device(device)), **words})
    check(settings.runtime, opened(settings.device), settings.dtype)
    return settings


def aimed(traced: Traced, space: SearchSpace, table: LatencyTable) -> tuple[Traced, SearchSpace]:
    """Return a traced network that knows its latency, and the space cut to the widths of the table.

    Raises:
        UsageError: If the table is of another network.
    """
    table.check_groups(traced.graph.sizes)
    shape = tuple(table.content.conditions.input_shape)
    if shape != traced.input_shape:
        raise UsageError(
            f"the latency table is for inputs of {shape}, but {traced.name} here takes {traced.input_shape}: "
            "profile it with --input-shape"
        )
    latency = Latency(table.counter(), round(table.reference_ms * 1e6))
    known = {group.name: group.widths for group in table.content.groups}
    cost = CostModel(traced.model, traced.graph, latency)
    return replace(traced, cost=cost), replace(space, known=known)


def elsewhere(table: LatencyTable) -> str:
    """Say how this machine differs from the one that a table is of; nothing where it does not."""
    conditions = table.content.conditions
    try:
        here = fingerprint(
            conditions.runtime,
            conditions.device,
            conditions.dtype,
            example=torch.zeros(conditions.batch, *conditions.input_shape),
            channels_last=conditions.channels_last,
            threads=conditions.threads,
        )
    except ArchsearchError as error:
        return str(error)
    return "; ".join(differences(table.content.fingerprint, here))


def predicted(table: LatencyTable, widths: Mapping[str, int]) -> dict[str, Any]:
    """Return what a table says of a network, and under which conditions, as plain values."""
    ms, low, high = table.predict(np.array([widths[name] for name in table.names]))
    conditions = table.content.conditions.model_dump(mode="json")
    return {
        "predicted_ms": round(float(ms), 6),
        "low_ms": round(float(low), 6),
        "high_ms": round(float(high), 6),
        "reference_ms": round(table.reference_ms, 6),
        "table": table.key[:16],
        **{name: conditions[name] for name in _CONDITIONS},
        "accelerator": table.content.fingerprint.get("accelerator"),
        "verified": False,
    }


def measured(
    path: Path, facts: Mapping[str, Any], *, trust_code: bool = False, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure the network of a file beside its reference in fresh processes.

    Args:
        path: The architecture file.
        facts: What ``predicted`` gave.
        trust_code: Whether a model that names the user's own code may be imported.
        say: Takes lines for the user.

    Returns:
        The facts with what was measured: the median over processes of the share of the reference's latency,
        each process's share, and the milliseconds.

    Raises:
        UsageError: If the network cannot be measured here.
    """
    shares, times, stable = [], [], True
    with TemporaryDirectory() as directory:
        for number in range(PROCESSES):
            say(f"measures {path} beside its reference, process {number + 1} of {PROCESSES}")
            out = Path(directory) / f"{number}.json"
            command = [sys.executable, "-m", "archsearch.cli", "bench", str(path), "--out", str(out)]
            for name in _CONDITIONS[:-1]:
                command += [f"--{name}", str(facts[name])]
            command += ["--layout", "channels_last" if facts["channels_last"] else "contiguous"]
            command += ["--trust-code"] if trust_code else []
            done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603  our own program
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
                raise UsageError(f"{path} could not be measured: {last.removeprefix('archsearch: error: ')}")
            network = files.read_json(out)["networks"][1]
            shares.append(float(network["ratio"]))
            times.append(float(network["median_ms"]))
            stable &= bool(network["stable"])
    return {
        **facts,
        "measured_share": round(median(shares), 6),
        "measured_shares": [round(share, 6) for share in shares],
        "measured_ms": round(median(times), 6),
        "stable": stable,
        "verified": True,
    }


def verify_file(path: Path, *, trust_code: bool = False, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure the network of a file that was found for a latency, and write down in it what came out.

    Raises:
        SpecError: If the file says nothing of a latency.
        UsageError: If this is not the device that the network was found for, or it cannot be measured here.
    """
    facts = Architecture.read(path).provenance.get("latency")
    if not isinstance(facts, Mapping) or not {*_CONDITIONS, "accelerator"} <= facts.keys():
        raise SpecError(
            f"{path}: provenance.latency: is missing, or lacks something: the file was not found for a "
            "latency; use bench"
        )
    for name in _TIMES:
        if not isinstance(facts.get(name), (int, float)):
            raise SpecError(f"{path}: provenance.latency.{name}: must be milliseconds")
    own = opened(str(facts["device"])).facts()["accelerator"]
    if facts["accelerator"] != own:
        raise UsageError(
            f"{path}: was found for {facts['accelerator']}, and this is {own}: verify it there, or measure "
            "it here with bench"
        )
    facts = measured(path, facts, trust_code=trust_code, say=say)
    note(path, facts)
    return facts


def note(path: Path, facts: Mapping[str, Any]) -> Architecture:
    """Write what is known of a latency into an architecture file; return the new content."""
    architecture = Architecture.read(path)
    provenance = {**architecture.provenance, "latency": dict(facts)}
    noted = architecture.model_copy(update={"provenance": provenance})
    noted.write(path)
    return noted


def verdict(facts: Mapping[str, Any], targets: list[Target]) -> str:
    """Return what is to be said of a found network's latency."""
    interval = f"{facts['low_ms']:.3f} to {facts['high_ms']:.3f} ms"
    share = facts["predicted_ms"] / facts["reference_ms"]
    words = f"latency: predicted {facts['predicted_ms']:.3f} ms ({interval}), {share:.3f} of the reference"
    if not facts["verified"]:
        return f"{words}; not verified on its device: `archsearch verify` does that there"
    words += f"; measured {facts['measured_ms']:.3f} ms, {facts['measured_share']:.3f} of the reference"
    if not facts["stable"]:
        words += " (the machine was busy: not stable)"
    for target in targets:
        if target.resource == "latency":
            met = (
                facts["measured_share"] <= target.keep
                if target.keep is not None
                else facts["measured_ms"] * 1e6 <= target.absolute
            )
            words += f"; the target {target} is {'met' if met else 'MISSED'}"
    return words
