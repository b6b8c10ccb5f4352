"""A table as two pictures: the staircases that were probed, and predicted against measured latencies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from archsearch.latency.content import Role
from archsearch.latency.quantum import Staircase
from archsearch.latency.table import LatencyTable
from archsearch.pictures import pyplot

BLUE, RED, GREY = "#2f6f9f", "#c2410c", "#9aa5b1"
COLORS = (BLUE, RED, "#15803d", "#6b4fa0", "#8a6d1d")
TITLES = {"makes": "channels that a layer makes", "reads": "channels that a layer reads"}


def draw(table: LatencyTable, path: Path) -> None:
    """Draw both into one file, side by side.

    Raises:
        UsageError: If matplotlib is not installed.
    """
    plots = pyplot()
    curves = [curve for curve in table.content.staircases if not curve.flat]
    with plots.rc_context({"font.size": 9}):
        figure, panels = plots.subplots(
            1, 1 + bool(curves), figsize=(5 + 5 * bool(curves), 4.2), layout="constrained", squeeze=False
        )
        if curves:
            _staircases(panels[0, 0], curves, table.quantum)
        _networks(panels[0, -1], table)
        for axes in panels[0]:
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color="#e5e9ed", linewidth=0.6)
            axes.set_axisbelow(True)
        facts, conditions = table.content.fingerprint, table.content.conditions
        title = f"{conditions.model} by {conditions.runtime} on {facts.get('accelerator')}"
        title += f", {conditions.dtype}, batch {conditions.batch}"
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
        figure.savefig(path, dpi=150)
        plots.close(figure)


def _staircases(axes: Any, curves: list[Staircase], quantum: int) -> None:
    """Draw time over channels of each kind of layer, the multiples of the quantum as full marks."""
    ops = list(dict.fromkeys(curve.op for curve in curves))
    for curve in curves:
        channels, ms = np.array(curve.channels), np.array(curve.ms)
        color = COLORS[ops.index(curve.op) % len(COLORS)]
        style = "-" if curve.axis == "makes" else "--"
        axes.plot(channels, ms, style, color=color, linewidth=1, label=f"{curve.op}, {TITLES[curve.axis]}")
        worth = channels % quantum == 0
        axes.plot(channels[worth], ms[worth], "o", color=color, markersize=5)
        axes.plot(channels[~worth], ms[~worth], "o", color=color, markersize=3, markerfacecolor="white")
    axes.set_ylim(bottom=0)
    axes.set_xticks(range(32, 65, 8))
    axes.set_xlabel("channels (64 along the other axis)")
    axes.set_ylabel("milliseconds")
    axes.set_title(
        f"channel quantum {quantum} (full marks)" if quantum > 1 else "every width is worth having"
    )
    axes.legend(frameon=False, loc="lower right", fontsize=8)


def _networks(axes: Any, table: LatencyTable) -> None:
    """Draw the held-out networks with their intervals, and where predicted is measured."""
    errors: list[float] = []
    ends = [float("inf"), 0.0]
    kinds: tuple[tuple[Role, str, str], ...] = (
        ("held-out", "of any size", BLUE),
        ("equal-macs", "with equal multiply-adds", RED),
    )
    for role, words, color in kinds:
        widths, measured = table.networks(role)
        if not len(widths):
            continue
        ms, low, high = table.tested(widths)
        axes.errorbar(
            measured,
            ms,
            [ms - low, high - ms],
            fmt="o",
            markersize=3,
            linewidth=0.6,
            color=color,
            label=words,
        )
        errors += np.abs(ms / measured - 1).tolist()
        ends = [min(ends[0], *measured, *low), max(ends[1], *measured, *high)]
    axes.plot(ends, ends, color=GREY, linewidth=1, zorder=0)
    axes.set_xlabel("measured, milliseconds")
    axes.set_ylabel("predicted, milliseconds")
    axes.set_title(f"{len(errors)} networks held out: {100 * np.mean(errors):.1f} % off on average")
    axes.legend(frameon=False, loc="upper left", fontsize=8)
