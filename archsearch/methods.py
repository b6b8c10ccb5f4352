"""Several methods at one target, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from archsearch.allocation import ALLOCATIONS
from archsearch.api import find
from archsearch.errors import UsageError
from archsearch.pruners import PRUNERS
from archsearch.results import Arm, Record
from archsearch.trainer import is_main


def compare(model: str | nn.Module, methods: str, *, out: Path, **options: Any) -> tuple[Record, list[Path]]:
    """Run ``find`` with several methods and gather their arms in one record.

    The reference and the uniform widths are trained once, as all trainings are kept and found again; so is
    the network of two methods that find the same widths.

    Args:
        model: As for ``find``.
        methods: Names of pruners with commas between, or ``"all"``; ``taylor:knapsack`` takes another
            allocation than the method's own.
        out: Directory of the results; each method has its own in it.
        options: Further arguments of ``find``.

    Returns:
        The record, and the files written.

    Raises:
        ArchsearchError: As ``find``; a method's name that is unknown before anything is trained.
    """
    names = list(PRUNERS) if methods == "all" else [name for name in methods.split(",") if name]
    if not names:
        raise UsageError("--methods names no pruner; `archsearch list pruners` lists them")
    for name in names:
        method, _, allocation = name.partition(":")
        PRUNERS[method]
        if allocation:
            ALLOCATIONS[allocation]
    arms: dict[str, Arm] = {}
    paths: list[Path] = []
    conditions: Mapping[str, Any] = {}
    for name in names:
        method, _, allocation = name.partition(":")
        place = out / name.replace(":", "-")
        found = find(model, method=method, allocation=allocation or None, out=place, **options)
        conditions = found.record.conditions
        for arm in found.record.arms:
            arms.setdefault(arm.name, arm)
        paths.append(place / "architecture.yaml")
    kept = {key: value for key, value in conditions.items() if key not in ("method", "allocation")}
    record = Record({"methods": names, **kept}, list(arms.values()))
    if is_main():
        paths += record.write(out)
    return record, paths
