"""What a run leaves behind: its arms, its conditions, and the files that hold them."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev, variance
from typing import Any

from archsearch import files
from archsearch.recipe import Recipe

_PACKAGES = ("archsearch", "torch", "torchvision", "numpy")


@dataclass(frozen=True)
class Arm:
    """One network trained one way, with one or several seeds.

    Attributes:
        name: What was done, such as ``"l1_norm, scratch-b"``.
        widths: Which widths: ``"reference"``, ``"uniform"`` or the method's name.
        budget: How it was trained, such as ``"reference"`` or ``"scratch-b"``.
        macs: Multiply-adds of one image.
        params: Parameters.
        epochs: Of each training.
        accuracies: Test accuracy in percent of each seed; empty without data.
        seconds: Of all trainings together.
        latency: Share of the reference's, as measured; ``None`` if it was not.
    """

    name: str
    widths: str
    budget: str
    macs: int
    params: int
    epochs: int = 0
    accuracies: tuple[float, ...] = ()
    seconds: float = 0.0
    latency: float | None = None

    @property
    def mean(self) -> float | None:
        """Mean test accuracy in percent."""
        return fmean(self.accuracies) if self.accuracies else None

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation of the test accuracy in percent; ``None`` with fewer than two seeds."""
        return stdev(self.accuracies) if len(self.accuracies) > 1 else None

    @property
    def accuracy(self) -> str:
        """The accuracy as a table shows it: ``97.22 ± 0.31``."""
        if self.mean is None:
            return "-"
        return f"{self.mean:.2f}" + (f" ± {self.deviation:.2f}" if self.deviation is not None else "")


@dataclass(frozen=True)
class Record:
    """A run: its conditions and its arms."""

    conditions: Mapping[str, Any]
    arms: Sequence[Arm] = field(default_factory=tuple)

    def table(self) -> list[list[str]]:
        """Return the header and one row an arm, as people read them.

        A column has the shares of the reference's latency where they were measured. Where uniform widths were
        trained with several seeds, a last one says what arms that were trained likewise gain over them.
        """
        columns, rows = list(COLUMNS), [row(arm, self.arms[0]) for arm in self.arms]
        if any(arm.latency is not None for arm in self.arms):
            columns.append(LATENCY)
            rows = [[*cells, share_of(arm)] for cells, arm in zip(rows, self.arms, strict=True)]
        uniform = {arm.budget: arm for arm in self.arms if arm.widths == "uniform"}
        gains = [gain(arm, uniform.get(arm.budget)) for arm in self.arms]
        if not any(gains):
            return [columns, *rows]
        cells = [f"{g[0]:+.2f} ± {g[1]:.2f}" if g else "-" for g in gains]
        return [[*columns, GAIN], *([*r, cell] for r, cell in zip(rows, cells, strict=True))]

    def write(self, directory: Path) -> list[Path]:
        """Write ``results.json`` and ``results.md``; return their paths."""
        as_json, as_table = directory / "results.json", directory / "results.md"
        files.write_json(
            as_json, {"conditions": dict(self.conditions), "arms": [asdict(arm) for arm in self.arms]}
        )
        files.write_text(as_table, self.markdown())
        return [as_json, as_table]

    def markdown(self) -> str:
        """Return conditions and table as a page."""
        lines = [f"- {name}: {_plain(value)}" for name, value in self.conditions.items()]
        header, *rows = self.table()
        table = [f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows]]
        return "\n".join([*lines, "", *table, ""])


COLUMNS = ("network", "test accuracy %", "MACs", "kept", "params", "kept", "epochs", "seconds")


LATENCY = "latency kept"
GAIN = "over uniform (95 %)"


def gain(arm: Arm, baseline: Arm | None) -> tuple[float, float] | None:
    """Return the difference of two mean accuracies in points, and half of its 95 % interval (Welch's t).

    ``None`` where one of the two has fewer than two seeds, or neither's accuracies vary, which tells nothing
    of the noise, or they are the same arm.
    """
    if baseline is None or arm is baseline or min(len(arm.accuracies), len(baseline.accuracies)) < 2:
        return None
    from scipy.stats import t  # slow to import, and few runs have several seeds

    spreads = [variance(each.accuracies) / len(each.accuracies) for each in (arm, baseline)]
    difference = fmean(arm.accuracies) - fmean(baseline.accuracies)
    if not sum(spreads):
        return None
    freedom = sum(spreads) ** 2 / sum(
        spread**2 / (len(each.accuracies) - 1) for spread, each in zip(spreads, (arm, baseline), strict=True)
    )
    return difference, float(t.ppf(0.975, freedom)) * sqrt(sum(spreads))


def row(arm: Arm, reference: Arm) -> list[str]:
    """Return an arm's cells, in the order of ``COLUMNS``."""
    return [
        arm.name,
        arm.accuracy,
        f"{arm.macs:,}",
        f"{arm.macs / reference.macs:.4f}",
        f"{arm.params:,}",
        f"{arm.params / reference.params:.4f}",
        str(arm.epochs) if arm.epochs else "-",
        f"{arm.seconds:.0f}" if arm.seconds else "-",
    ]


def share_of(arm: Arm) -> str:
    """Return the share of the reference's latency as a table shows it."""
    if arm.widths == "reference":
        return "1.000"
    return "-" if arm.latency is None else f"{arm.latency:.3f}"


def environment() -> dict[str, str]:
    """Return the versions and the kind of machine that a result was made with."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown (run from its source tree)"
    return {**found, "machine": f"{sys.platform} {platform.machine()}"}


def recipe_facts(recipe: Recipe) -> dict[str, Any]:
    """Return how long a recipe trains, and its fields that differ from the published CIFAR recipe."""
    values = recipe.as_dict()
    return {
        name: values[name]
        for name in values
        if name == "epochs" or getattr(recipe, name) != getattr(Recipe, name)
    }


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(part)}" for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    return str(value)
