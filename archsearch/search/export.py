"""What a search leaves in its run directory, the study aside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from archsearch import files
from archsearch.architecture import Architecture
from archsearch.pipeline import write_architecture
from archsearch.rebuild import Traced
from archsearch.results import Arm, Record
from archsearch.search.finals import Outcome
from archsearch.settling import Facts, share_in
from archsearch.tensor_files import write_tensors

ARCHITECTURE, WEIGHTS = "architecture.yaml", "weights.safetensors"

FINALISTS = "finalists"
"""In the run directory: an architecture file of each finalist."""

UNIFORM = f"{FINALISTS}/uniform.yaml"
"""That of uniform widths, which is there from the beginning."""

_PAGES = ("validation", "calibration", "latencies")
"""Conditions that are tables, and stand in the results alone."""

_TIMES = ("predicted_ms", "low_ms", "high_ms", "measured_ms", "measured_share", "stable")


def record_of(
    outcome: Outcome, reference: Arm, conditions: Mapping[str, Any], times: Mapping[str, Facts]
) -> Record:
    """Return the results of a search: its conditions, what decided, and all arms.

    Args:
        outcome: Of the finals.
        reference: Its arm.
        conditions: Of the search.
        times: What is known of each finalist's latency, by name; empty without a latency target.
    """
    validation = {
        name: [round(accuracy, 2) for accuracy in accuracies]
        for name, accuracies in outcome.validation.items()
    }
    facts = {**conditions, "verdict": outcome.verdict, "validation": validation}
    if times:
        facts["latency"] = dict(times[outcome.exported.name])
        facts["latencies"] = {
            name: {key: seen[key] for key in _TIMES if key in seen} for name, seen in times.items()
        }
    arms = [replace(arm, latency=share_in(times.get(arm.widths))) for arm in outcome.arms]
    return Record(facts, [reference, *arms])


def exported(
    traced: Traced, outcome: Outcome, record: Record, out: Path
) -> tuple[Architecture, Sequence[Path]]:
    """Write architecture, weights and results; return the architecture, and all files."""
    provenance = {name: fact for name, fact in record.conditions.items() if name not in _PAGES}
    provenance["widths of"] = outcome.exported.name
    architecture = traced.architecture(outcome.exported.widths, provenance)
    path = write_architecture(architecture, out / ARCHITECTURE)
    write_tensors(out / WEIGHTS, outcome.model.state_dict())
    return architecture, [path, out / WEIGHTS, *record.write(out)]


def finalist_file(name: str) -> str:
    """Return where in a run directory the architecture file of a finalist is."""
    return f"{FINALISTS}/{files.plain(name)}.yaml"


def write_finalist(traced: Traced, name: str, widths: Mapping[str, int], out: Path) -> tuple[Path, str]:
    """Write the architecture file of a finalist; return it and the architecture's key.

    A file of the same network stays, with what was measured of it.
    """
    architecture = traced.architecture(widths, {"widths of": name})
    files.probe(out / FINALISTS, 2**20)
    path = out / finalist_file(name)
    if not path.exists() or Architecture.read(path).key != architecture.key:
        architecture.write(path)
    return path, architecture.key
