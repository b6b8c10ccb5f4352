"""The picture of a front: accuracy against cost, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from archsearch.pictures import pyplot
from archsearch.search.palette import BLUE, GREEN, GREY, MARKS, ORANGE, PURPLE, RED
from archsearch.search.pictures import STYLE
from archsearch.search.points import REFERENCE, RESOURCES, Point, undominated
from archsearch.targets import Resource

COLOURS = {REFERENCE: GREY, "uniform": ORANGE, "search": BLUE}
OTHERS = (GREEN, PURPLE, RED)
APART = 4.0
"""Points between the networks of one target."""


def draw_front(points: Sequence[Point], resource: Resource, title: str, path: Path) -> None:
    """Draw all points: mean and deviation over the seeds, hollow where another one is better.

    Args:
        points: Those of one network have one colour and a line.
        resource: Whose cost counts.
        title: Of the picture.
        path: The file.

    Raises:
        UsageError: If matplotlib is not installed.
    """
    plots, front = pyplot(), undominated(points)
    from matplotlib.transforms import offset_copy

    with plots.rc_context(STYLE):
        figure = plots.figure(figsize=(7.2, 4.6), layout="constrained")
        axes = figure.subplots()
        for number, name in enumerate(dict.fromkeys(point.network for point in points)):
            own = sorted((point for point in points if point.network == name), key=lambda point: point.cost)
            colour = COLOURS.get(name, OTHERS[number % len(OTHERS)])
            mark = MARKS[number % len(MARKS)]
            # Networks of one target cost about the same: side by side, their bars can be told apart.
            aside = offset_copy(axes.transData, figure, APART * max(number - 1, 0), 0, units="points")
            x, y = [point.cost for point in own], [point.mean for point in own]
            axes.plot(x, y, color=colour, lw=0.8, alpha=0.6, transform=aside)
            axes.plot([], [], mark, color=colour, ms=6.5, label=name)
            for point in own:
                axes.errorbar(
                    point.cost, point.mean, yerr=point.deviation, fmt=mark, color=colour, ms=6.5, capsize=4,
                    lw=1.3, markerfacecolor=colour if point in front else "white", zorder=3, transform=aside,
                )  # fmt: skip
        # What is drawn aside does not widen the axes by itself.
        reach = [(point, point.deviation or 0.0) for point in points]
        axes.update_datalim(
            [(point.cost, point.mean + sign * far) for point, far in reach for sign in (-1, 1)]
        )
        axes.autoscale_view()
        axes.set_xlabel(RESOURCES[resource])
        axes.set_ylabel("test accuracy, %: mean ± deviation over seeds")
        axes.ticklabel_format(useOffset=False)
        axes.grid(color="#e4e7ea")
        axes.set_axisbelow(True)
        axes.set_title("Accuracy against cost\n", loc="left", fontsize=10, fontweight="bold")
        below = f"{title}; hollow: another one costs no more and is better; side by side within a target"
        axes.text(0, 1.02, below, transform=axes.transAxes, fontsize=8, color="#555555", va="bottom")
        figure.legend(loc="outside lower center", ncols=4, fontsize=8)
        figure.savefig(path, dpi=120)
        plots.close(figure)
