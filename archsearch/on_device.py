"""Latency targets: whose latency counts, and a network that knows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from archsearch.cost import CostModel, Latency
from archsearch.errors import ArchsearchError, UsageError
from archsearch.latency.accuracy import assess
from archsearch.latency.devices import opened
from archsearch.latency.fingerprint import differences
from archsearch.latency.layers import find_layers
from archsearch.latency.library import own_table
from archsearch.latency.measure import fingerprint
from archsearch.latency.meter import Settings
from archsearch.latency.runtimes import check
from archsearch.latency.table import LatencyTable
from archsearch.rebuild import Traced
from archsearch.space import Bounds, SearchSpace
from archsearch.trainer import is_main
from archsearch.training.evaluation import resolve_device


@dataclass(frozen=True)
class TargetDevice:
    """Whose latency counts.

    Attributes:
        table: What was measured on it.
        here: Whether it is this machine, so that what is found can be measured.
    """

    table: LatencyTable
    here: bool


def target_device(
    latency: object,
    table: str | Path | None,
    other_device: bool = False,
    *,
    runtime: str | Mapping[str, Any] | None = None,
    traced: Traced | None = None,
    device: str = "auto",
    store: Path = Path("runs"),
    say: Callable[[str], None] = lambda line: None,
) -> TargetDevice | None:
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
        own = own_table(traced, allowed_of(traced), settings, store / "latency", leads=is_main(), say=say)
        _complain(own, say)
        return TargetDevice(own, here=True)
    if table is None:
        return None
    read = LatencyTable.read(table)
    away = elsewhere(read)
    if away and not other_device:
        raise UsageError(
            f"{table} was measured elsewhere ({away}): profile this device, or give --other-device"
        )
    _complain(read, say)
    return TargetDevice(read, here=not away)


def _complain(table: LatencyTable, say: Callable[[str], None]) -> None:
    """Say why a table is not good enough, if it is not."""
    for complaint in assess(table).complaints:
        say(
            f"latency: the table is not as good as it should be: {complaint}; more --blocks or --calibration "
            "of profile may mend it"
        )


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
    table.check_layers(find_layers(traced))
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
