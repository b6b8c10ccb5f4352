"""The picture of a front, accuracy against cost: a PNG file, and a page that answers to the mouse."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from archsearch import files
from archsearch.pictures import pyplot
from archsearch.search.figures import plotly
from archsearch.search.page import SCRIPT
from archsearch.search.palette import BLUE, GREEN, GREY, MARKS, ORANGE, PURPLE, RED, SYMBOLS
from archsearch.search.pictures import STYLE
from archsearch.search.points import REFERENCE, RESOURCES, Point, undominated
from archsearch.targets import Resource

COLOURS = {REFERENCE: GREY, "uniform": ORANGE, "search": BLUE}
OTHERS = (GREEN, PURPLE, RED)
APART = 4.0
"""Points between the networks of one target."""

PICTURE, PAGE = "front.png", "front.html"
TITLE = "Accuracy against cost"
ACCURACY = "test accuracy, %: mean ± deviation over seeds"
HOLLOW = "hollow: another one costs no more and is better"


def draw_front(points: Sequence[Point], resource: Resource, title: str, directory: Path) -> list[Path]:
    """Draw all points, mean and deviation over the seeds, hollow where another one is better.

    Args:
        points: Those of one network have one colour and a line.
        resource: Whose cost counts.
        title: Of the picture.
        directory: Gets the picture, the page, and the one script that the page needs beside it.

    Returns:
        The files.

    Raises:
        UsageError: If matplotlib or plotly is not installed.
    """
    figure = front_figure(points, resource, title)
    _draw_picture(points, resource, title, directory / PICTURE)
    from plotly.offline import get_plotlyjs

    files.write_text(directory / SCRIPT, get_plotlyjs())
    files.write_text(directory / PAGE, figure.to_html(include_plotlyjs=SCRIPT, div_id="front"))
    return [directory / PICTURE, directory / PAGE, directory / SCRIPT]


def front_figure(points: Sequence[Point], resource: Resource, title: str) -> Any:
    """Return the front as a figure of plotly; arguments as of ``draw_front``.

    Raises:
        UsageError: If plotly is not installed.
    """
    figure, front = plotly().Figure(), undominated(points)
    for number, (name, colour, own) in enumerate(_networks(points)):
        symbol = SYMBOLS[number % len(SYMBOLS)]
        figure.add_scatter(
            x=[point.cost for point in own],
            y=[point.mean for point in own],
            error_y={"array": [point.deviation or 0 for point in own]},
            mode="lines+markers",
            name=html.escape(name),
            line={"color": colour, "width": 1},
            marker={"size": 11, "symbol": [symbol if p in front else f"{symbol}-open" for p in own]},
            text=[_told(point, resource) for point in own],
            hoverinfo="text",
        )
    return figure.update_layout(
        template="plotly_white",
        title=f"{TITLE}<br><sup>{html.escape(title)}; {HOLLOW}</sup>",
        xaxis_title=RESOURCES[resource],
        yaxis_title=ACCURACY,
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.0, "x": 1.0, "xanchor": "right"},
    )


def _networks(points: Sequence[Point]) -> Iterator[tuple[str, str, list[Point]]]:
    """Yield the name of each network, its colour, and its points by their costs."""
    for number, name in enumerate(dict.fromkeys(point.network for point in points)):
        own = sorted((point for point in points if point.network == name), key=lambda point: point.cost)
        yield name, COLOURS.get(name, OTHERS[number % len(OTHERS)]), own


def _told(point: Point, resource: Resource) -> str:
    """Return what the mouse is told of a point."""
    spread = "" if point.deviation is None else f" ± {point.deviation:.2f}"
    lines = [point.network + (", exported" if point.exported else "")]
    lines += [f"target {point.target}"] if point.target else []
    lines += [f"{point.mean:.2f}{spread} %", f"{RESOURCES[resource]}: {point.cost:.4g}"]
    lines += [f"{point.macs:,} MACs", f"{point.params:,} parameters"]
    return "<br>".join(html.escape(line) for line in lines)


def _draw_picture(points: Sequence[Point], resource: Resource, title: str, path: Path) -> None:
    plots, front = pyplot(), undominated(points)
    from matplotlib.transforms import offset_copy

    with plots.rc_context(STYLE):
        figure = plots.figure(figsize=(7.2, 4.6), layout="constrained")
        axes = figure.subplots()
        for number, (name, colour, own) in enumerate(_networks(points)):
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
        axes.set_ylabel(ACCURACY)
        axes.ticklabel_format(useOffset=False)
        axes.grid(color="#e4e7ea")
        axes.set_axisbelow(True)
        axes.set_title(f"{TITLE}\n", loc="left", fontsize=10, fontweight="bold")
        below = f"{title}; {HOLLOW}; side by side within a target"
        axes.text(0, 1.02, below, transform=axes.transAxes, fontsize=8, color="#555555", va="bottom")
        figure.legend(loc="outside lower center", ncols=4, fontsize=8)
        figure.savefig(path, dpi=120)
        plots.close(figure)
