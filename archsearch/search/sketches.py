"""The two small pictures of a trial: its widths, and how it was trained."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from archsearch import files
from archsearch.errors import IntegrityError
from archsearch.pictures import pyplot
from archsearch.search.palette import BLUE, GREY, ORANGE
from archsearch.search.pictures import NAMED, STYLE

METRICS = "metrics.csv"
MAX_BYTES = 2**22


def draw_trial_widths(
    groups: Sequence[tuple[str, int]], widths: Sequence[int], title: str, path: Path
) -> None:
    """Draw the kept channels of each group before the reference's.

    Raises:
        UsageError: If matplotlib is not installed.
    """
    plots = pyplot()
    with plots.rc_context(STYLE):
        figure = plots.figure(
            figsize=(min(12.0, max(5.0, 0.26 * len(groups) + 1.5)), 3.6), layout="constrained"
        )
        axes = figure.subplots()
        places = range(len(groups))
        axes.bar(places, [size for _, size in groups], width=0.84, color="#d9dee3", label="reference")
        axes.bar(places, widths, width=0.84, color=BLUE, label="kept")
        shown = list(places)[:: -(-len(groups) // NAMED)]
        axes.set_xticks(shown, [groups[place][0] for place in shown], rotation=90, fontsize=7)
        axes.set_xlim(-0.7, len(groups) - 0.3)
        axes.set_ylabel("channels")
        axes.set_title(title, loc="left", fontsize=9)
        figure.legend(loc="outside upper right", ncols=2, fontsize=8)
        _save(figure, path)


def draw_training(directory: Path, title: str, path: Path) -> None:
    """Draw the accuracies and the loss of a training over its epochs; nothing if it kept no metrics.

    Args:
        directory: Of the training.
        title: Above the picture.
        path: The picture.

    Raises:
        IntegrityError: If the metrics are not what a training writes.
        UsageError: If matplotlib is not installed.
    """
    source = directory / METRICS
    if not source.exists():
        return
    rows = list(csv.DictReader(io.StringIO(files.read_text(source, MAX_BYTES, IntegrityError))))
    try:
        series = {name: [float(row[name]) for row in rows] for name in rows[0]} if rows else {}
        epochs = series["epoch"]
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"{source}: is not the record of a training: {error}") from error
    plots = pyplot()
    with plots.rc_context(STYLE):
        figure = plots.figure(figsize=(7.2, 2.9), layout="constrained")
        left, right = figure.subplots(1, 2)
        for axes, what, label in ((left, "accuracy", "accuracy, %"), (right, "loss", "loss")):
            for part, colour in (("train", GREY), ("validation", ORANGE)):
                if (values := series.get(f"{part}_{what}")) is not None:
                    axes.plot(epochs, values, ".-", ms=3, lw=1.2, color=colour, label=part)
            axes.set_xlabel("epoch")
            axes.set_ylabel(label)
            axes.xaxis.get_major_locator().set_params(integer=True)
        left.set_title(title, loc="left", fontsize=9)
        right.legend(fontsize=8)
        _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=100)
    finally:
        pyplot().close(figure)
