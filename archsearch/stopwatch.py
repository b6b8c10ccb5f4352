"""How long a found network takes: what its device's table predicts, and what fresh processes measure."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from archsearch import files
from archsearch.architecture import Architecture
from archsearch.errors import SpecError, UsageError
from archsearch.latency.devices import opened
from archsearch.latency.table import LatencyTable
from archsearch.on_device import TargetDevice
from archsearch.settling import used
from archsearch.targets import Target
from archsearch.trainer import is_main

PROCESSES = 3  # fresh ones: memory and caches lie differently in each
MEASURED = "latency/measured"
"""In a store: what measurements of networks are kept in."""

WAIT_S = 0.5
_PLACE = ("accelerator", "processor")
_CONDITIONS = ("runtime", "device", "dtype", "batch", "threads", "channels_last")
_TIMES = ("predicted_ms", "low_ms", "high_ms", "reference_ms")


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
        **_versions(table.content.fingerprint),
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
            say(f"measures the network beside its reference, process {number + 1} of {PROCESSES}")
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
            benched = files.read_json(out)
            network = benched["networks"][1]
            shares.append(float(network["ratio"]))
            times.append(float(network["median_ms"]))
            stable &= bool(network["stable"])
    return {
        **facts,
        **_versions(benched["conditions"]["fingerprint"]),
        "measured_share": round(median(shares), 6),
        "measured_shares": [round(share, 6) for share in shares],
        "measured_ms": round(median(times), 6),
        "stable": stable,
        "verified": True,
    }


@dataclass(frozen=True)
class Stopwatch:
    """Says how long networks take on a device: measures each once, or predicts where the device is away.

    Attributes:
        device: Whose latency counts.
        store: Where measurements are kept, one file a network and table.
        trust_code: Whether a model that names the user's own code may be imported.
        say: Takes lines for the user.
    """

    device: TargetDevice
    store: Path
    trust_code: bool = False
    say: Callable[[str], None] = lambda line: None

    def __call__(self, architecture: Architecture) -> dict[str, Any]:
        """Return what is known of a network's latency.

        Raises:
            UsageError: If it cannot be measured here.
        """
        widths = {name: group.width for name, group in architecture.widths.items()}
        seen = predicted(self.device.table, widths)
        if not self.device.here:
            return seen
        path = self.store / MEASURED / f"{seen['table']}-{architecture.key[:16]}.json"
        while not is_main() and not path.exists():
            time.sleep(WAIT_S)  # of several processes that train together, one measures
        if not path.exists():
            files.probe(path.parent, 2**16)
            files.write_json(path, self._measured(architecture, seen))
        found: dict[str, Any] = files.read_json(path)
        return found

    def _measured(self, architecture: Architecture, seen: Mapping[str, Any]) -> dict[str, Any]:
        with TemporaryDirectory() as directory:
            path = Path(directory) / "architecture.yaml"
            architecture.write(path)
            return measured(path, seen, trust_code=self.trust_code, say=self.say)


def verify_file(
    path: Path, device: str | None = None, *, trust_code: bool = False, say: Callable[[str], None]
) -> Architecture:
    """Measure the network of a file that was found for a latency, and write down in it what came out.

    Args:
        path: The architecture file.
        device: Which of several of this machine; ``None`` takes the one that the file names.
        trust_code: Whether a model that names the user's own code may be imported.
        say: Takes lines for the user.

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
    facts = {**facts, "device": device or facts["device"]}
    own = opened(str(facts["device"])).facts()
    there, here = ([each[name] for name in _PLACE if name in facts and name in each] for each in (facts, own))
    if there != here:
        raise UsageError(
            f"{path}: was found for {', '.join(there)}, and this is {', '.join(here)}: verify it there, or "
            "measure it here with bench"
        )
    return note(path, measured(path, facts, trust_code=trust_code, say=say))


def _versions(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a fingerprint belongs into an architecture file: the device and what ran there."""
    known = (*_PLACE, "driver", "torch", "runtime_version")
    return {name: fingerprint[name] for name in known if fingerprint.get(name)}


def targets_in(architecture: Architecture) -> list[Target]:
    """Return the latency targets that an architecture was found for, as far as its file says."""
    said = str(architecture.provenance.get("target", "")).split(", ")
    limits = [each.removeprefix("latency ") for each in said if each.startswith("latency ")]
    return [Target.parse("latency", limit) for limit in limits]


def note(path: Path, facts: Mapping[str, Any]) -> Architecture:
    """Write what is known of a latency into an architecture file; return the new content."""
    architecture = Architecture.read(path)
    provenance = {**architecture.provenance, "latency": dict(facts)}
    noted = architecture.model_copy(update={"provenance": provenance})
    noted.write(path)
    return noted


def verdict(facts: Mapping[str, Any], targets: Sequence[Target]) -> str:
    """Return what is to be said of a found network's latency."""
    interval = f"{facts['low_ms']:.3f} to {facts['high_ms']:.3f} ms"
    share = facts["predicted_ms"] / facts["reference_ms"]
    words = f"latency: predicted {facts['predicted_ms']:.3f} ms ({interval}), {share:.3f} of the reference"
    if not facts["verified"]:
        return f"{words}; not verified on its device: `archsearch verify` does that there"
    words += f"; measured {facts['measured_ms']:.3f} ms, {facts['measured_share']:.3f} of the reference"
    expected = facts["low_ms"] <= facts["measured_share"] * facts["reference_ms"] <= facts["high_ms"]
    words += "" if expected else ", outside of what was predicted"
    if not facts["stable"]:
        words += " (the machine was busy: not stable)"
    for target in targets:
        if target.resource == "latency":
            words += f"; the target {target} is {'met' if used(facts, [target]) <= 1 else 'MISSED'}"
    return words
