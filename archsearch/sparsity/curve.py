"""The curve of a lottery: accuracy against the share of the weights that is left."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path
from statistics import fmean, stdev

from archsearch import files
from archsearch.pictures import pyplot
from archsearch.results import Arm


@dataclass(frozen=True)
class Point:
    """One trained network.

    Attributes:
        kind: ``"dense"``, ``"ticket"`` or a control.
        round: Number of the round, from 1; 0 of the dense network.
        seed: Of its lottery.
        weights_kept: Share of the weights that stays.
        macs: Multiply-adds of one input, those of masked weights not counted.
        params: Parameters that stay.
        accuracy: On the test set, in percent.
        epochs: Of its schedule.
        seconds: Of its training.
    """

    kind: str
    round: int
    seed: int
    weights_kept: float
    macs: int
    params: int
    accuracy: float
    epochs: int
    seconds: float


def write_points(path: Path, points: Sequence[Point]) -> None:
    """Write one row for each network as CSV."""
    text = io.StringIO()
    table = csv.DictWriter(text, [field.name for field in fields(Point)], lineterminator="\n")
    table.writeheader()
    table.writerows(map(asdict, points))
    files.write_text(path, text.getvalue())


def arms_of(points: Sequence[Point]) -> list[Arm]:
    """Return one arm for each kind and round, the seeds together, in the order in which kinds come first."""
    return [
        Arm(
            f"{kind}, round {round_}: {fmean(point.weights_kept for point in same):.1%} of the weights"
            if round_
            else kind,
            kind,
            kind,
            round(fmean(point.macs for point in same)),
            round(fmean(point.params for point in same)),
            same[0].epochs,
            tuple(point.accuracy for point in same),
            sum(point.seconds for point in same),
        )
        for (kind, round_), same in _by_kind_and_round(points)
    ]


def plot_points(points: Sequence[Point], path: Path, title: str) -> None:
    """Draw mean accuracy against the share of the weights that is left, falling to the right, logarithmic.

    Bars are sample standard deviations over the seeds.

    Raises:
        UsageError: If matplotlib is not installed.
    """
    plots = pyplot()
    grouped = _by_kind_and_round(points)
    with plots.rc_context({"font.size": 9}):
        figure, axes = plots.subplots(figsize=(6.4, 4.2), layout="constrained")
        for kind, of_kind in groupby(grouped, key=lambda group: group[0][0]):
            same = [each for _, each in of_kind]
            shares = [100 * fmean(point.weights_kept for point in each) for each in same]
            means = [fmean(point.accuracy for point in each) for each in same]
            if kind == "dense":
                axes.axhline(means[0], color="#8fa3b3", linewidth=1, linestyle="--", label=kind)
                continue
            spread = [stdev(p.accuracy for p in each) if len(each) > 1 else 0.0 for each in same]
            axes.errorbar(shares, means, spread, marker="o", markersize=3, capsize=2, label=kind)
        axes.set_xscale("log")
        axes.invert_xaxis()
        shares = sorted({float(f"{100 * point.weights_kept:.3g}") for point in points if point.round})
        ticks = shares[:: 1 + len(shares) // 12]
        axes.minorticks_off()
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xlabel("weights left, %")
        axes.set_ylabel("test accuracy, %")
        axes.set_title(title, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        figure.savefig(path, dpi=150)
        plots.close(figure)


def _by_kind_and_round(points: Sequence[Point]) -> list[tuple[tuple[str, int], list[Point]]]:
    kinds = list(dict.fromkeys(point.kind for point in points))
    ordered = sorted(points, key=lambda point: (kinds.index(point.kind), point.round, point.seed))
    return [(key, list(same)) for key, same in groupby(ordered, key=lambda point: (point.kind, point.round))]
