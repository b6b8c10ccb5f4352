"""The pictures of a search, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from archsearch.pictures import pyplot
from archsearch.search.overview import Overview
from archsearch.search.palette import BLUE, GREY, MAP, MARKS, ORANGE, colour_of, of_start

STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
LETTER_PT, MARK_PT = 4.5, 40
"""Width of a letter of a legend, and of what stands before each label."""

NAMED = 40
"""With more groups than this, an axis names only some of them."""


@dataclass(frozen=True)
class Picture:
    """A picture of a search.

    Attributes:
        title: Above it.
        caption: How to read it.
        draw: Draws it into a figure of matplotlib.
        size: Width and height in inches, of a search.
        shown: Whether there is something to show.
    """

    title: str
    caption: str
    draw: Callable[[Overview, Any], None]
    size: Callable[[Overview], tuple[float, float]] = lambda seen: (7.2, 4.2)
    shown: Callable[[Overview], bool] = lambda seen: bool(seen.trials)


def missing() -> str | None:
    """Return what the pictures of a search need and is not installed, in words; ``None`` if all is there."""
    lacking = [package for package in ("matplotlib", "plotly") if find_spec(package) is None]
    if not lacking:
        return None
    return f"no pictures without {' and '.join(lacking)}: pip install 'archsearch[plots]'"


def draw(seen: Overview, directory: Path) -> list[Path]:
    """Draw all pictures of a search that have something to show; return the files.

    Raises:
        UsageError: If matplotlib is not installed.
    """
    written = []
    for name, picture in PICTURES.items():
        path = directory / f"{name}.png"
        if not picture.shown(seen):
            path.unlink(missing_ok=True)
            continue
        plots = pyplot()
        with plots.rc_context(STYLE):
            figure = plots.figure(figsize=picture.size(seen), layout="constrained")
            try:
                picture.draw(seen, figure)
                figure.savefig(path, dpi=120)
            finally:
                plots.close(figure)
        written.append(path)
    return written


def _titled(axes: Any, title: str, seen: Overview) -> None:
    axes.set_title(f"{title}\n", loc="left", fontsize=10, fontweight="bold")
    axes.text(0, 1.02, seen.title, transform=axes.transAxes, fontsize=8, color="#555555", va="bottom")


def history(seen: Overview, figure: Any) -> None:
    """Draw the values in the order of the trials, and what uniform widths reach."""
    axes = figure.subplots()
    searched = seen.searched
    axes.scatter(
        [t.number for t in searched], [t.value for t in searched], s=16, color=BLUE, label="searched"
    )
    for number, start in enumerate(seen.starts):
        colour, mark = of_start(number), MARKS[number % len(MARKS)]
        at = [trial.number for trial in start.trials]
        axes.scatter(at, start.values, s=42, color=colour, marker=mark, label=start.name, zorder=3)
    best = np.maximum.accumulate(seen.values)
    numbers = [trial.number for trial in seen.trials]
    axes.step(numbers, best, where="post", color=GREY, lw=1, label="best so far (mostly luck)")
    if (uniform := seen.uniform) is not None:
        axes.axhline(uniform.mean, color=ORANGE, lw=1, ls="--", zorder=0)
        low, high = uniform.mean - uniform.deviation, uniform.mean + uniform.deviation
        axes.axhspan(low, high, color=ORANGE, alpha=0.15, lw=0, zorder=0)
    axes.set_xlabel("trial")
    axes.set_ylabel(seen.unit)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _titled(axes, "History", seen)
    _legend(axes)


def importance(seen: Overview, figure: Any) -> None:
    """Draw what share of the values' spread each group explains."""
    axes = figure.subplots()
    shares = list(seen.importance.items())[::-1]
    axes.barh([name for name, _ in shares], [100 * share for _, share in shares], color=BLUE, height=0.7)
    axes.set_xlabel("importance (PED-ANOVA), % of all")
    axes.margins(y=0.01)
    _titled(axes, "Which groups matter", seen)


def accuracy(seen: Overview, figure: Any) -> None:
    """Draw values against what the networks cost, with the starts marked."""
    axes = figure.subplots()
    x, y = [seen.cost(trial) for trial in seen.searched], [trial.value for trial in seen.searched]
    if seen.has_latency and x:
        reach = np.array([_interval(trial) for trial in seen.searched]).T
        axes.errorbar(x, y, xerr=reach, fmt="none", ecolor=BLUE, elinewidth=0.6, alpha=0.35)
    axes.scatter(x, y, s=16, color=BLUE, label="searched")
    for number, start in enumerate(seen.starts):
        colour, mark = of_start(number), MARKS[number % len(MARKS)]
        axes.errorbar(
            seen.cost(start.trials[0]), start.mean, yerr=start.deviation or None, fmt=mark, color=colour,
            ms=7, capsize=4, lw=1.5, label=f"{start.name} ({_seeds(len(start.values))})", zorder=3,
        )  # fmt: skip
    axes.set_xlabel(seen.cost_label)
    axes.set_ylabel(seen.unit)
    axes.ticklabel_format(useOffset=False)
    axes.locator_params(axis="x", nbins=6)
    _titled(axes, "Accuracy against cost", seen)
    _legend(axes)


def finals(seen: Overview, figure: Any) -> None:
    """Draw the test accuracies of the finalists: every seed, mean and deviation."""
    axes = figure.subplots()
    arms = [arm for arm in seen.arms if arm.accuracies][::-1]
    for place, arm in enumerate(arms):
        colour = colour_of(arm)
        axes.scatter(arm.accuracies, [place] * len(arm.accuracies), s=18, color=colour, alpha=0.5, lw=0)
        axes.errorbar(
            arm.mean, place, xerr=arm.deviation, fmt="D", color=colour, ms=6, capsize=4, lw=1.5
        )  # fmt: skip
    whole = seen.arms[0].macs
    labels = [f"{arm.name}\n{100 * arm.macs / whole:.1f} % of the MACs" for arm in arms]
    axes.set_yticks(range(len(arms)), labels)
    axes.set_ylim(-0.6, len(arms) - 0.4)
    axes.set_xlabel("test accuracy, %: seeds, mean ± deviation")
    axes.grid(axis="x", color="#e4e7ea")
    axes.set_axisbelow(True)
    _titled(axes, "Finals", seen)


def parallel(seen: Overview, figure: Any) -> None:
    """Draw each trial as a line through what it keeps of the most important groups."""
    axes = figure.subplots()
    columns = seen.important
    low, high = float(seen.values.min()), float(seen.values.max())
    colours = pyplot().get_cmap(MAP)
    # The best on top.
    for row in np.argsort(seen.values, kind="stable"):
        share = (seen.values[row] - low) / ((high - low) or 1.0)
        axes.plot(seen.keeps[row, columns], color=colours(share), lw=0.6 + 1.2 * share, alpha=0.85)
    for place in range(len(columns)):
        axes.axvline(place, color="#333333", lw=0.8)
    axes.set_xticks(range(len(columns)), [seen.names[column] for column in columns], rotation=20, ha="right")
    axes.set_xlim(0, len(columns) - 1)
    axes.set_ylabel("channels kept, %")
    scale = pyplot().cm.ScalarMappable(pyplot().Normalize(low, high), MAP)
    figure.colorbar(scale, ax=axes, label=seen.unit, pad=0.02)
    axes.spines["left"].set_visible(False)
    _titled(axes, f"Trials by the {len(columns)} most important groups", seen)


def widths(seen: Overview, figure: Any) -> None:
    """Draw what the recommendation keeps of each group, and uniform widths."""
    axes = figure.subplots()
    places = np.arange(len(seen.names))
    if (recommended := seen.recommended) is not None:
        axes.bar(places, recommended, width=0.82, color=BLUE, label="recommended by the model")
    if (uniform := seen.uniform_keeps) is not None:
        axes.hlines(uniform, places - 0.46, places + 0.46, color=ORANGE, lw=2.2, label="uniform")
    axes.set_ylim(0, 105)
    axes.set_ylabel("channels kept, %")
    _name_groups(axes, seen)
    axes.set_xlim(-0.7, len(places) - 0.3)
    _titled(axes, "Widths", seen)
    _legend(axes)


def keeps(seen: Overview, figure: Any) -> None:
    """Draw what every trial keeps of every group, the best trial on top, with its value beside it."""
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(6, 1))
    order = np.argsort(-seen.values, kind="stable")
    image = left.imshow(seen.keeps[order], aspect="auto", cmap=MAP, vmin=0, vmax=100, interpolation="nearest")
    _name_groups(left, seen)
    rows = range(0, len(order), max(1, -(-len(order) // 25)))
    left.set_yticks(list(rows), [str(seen.trials[order[row]].number) for row in rows])
    left.set_ylabel("trial, the best on top")
    left.spines[:].set_visible(False)
    figure.colorbar(image, ax=left, label="channels kept, %", location="left", pad=0.02, shrink=0.7)
    right.plot(seen.values[order], range(len(order)), ".", color=BLUE, ms=4)
    right.set_xlabel(seen.unit.replace(", ", ",\n").replace(" (", "\n("), fontsize=7)
    right.tick_params(axis="x", labelsize=7)
    right.locator_params(axis="x", nbins=3)
    right.tick_params(axis="y", left=False, labelleft=False)
    _titled(left, "What each trial keeps", seen)


def utility(seen: Overview, figure: Any) -> None:
    """Draw the model's utility curve of each group with its interval."""
    posterior, names = seen.posterior, seen.believed
    if posterior is None:
        return
    columns = min(6, len(names))
    rows = -(-len(names) // columns)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    uniform = seen.uniform_keeps
    for axes, name in zip(grid, names, strict=False):
        curve, column = posterior.curves[name], seen.names.index(name)
        share = 100 * np.array(curve.widths) / seen.sizes[column]
        axes.fill_between(share, curve.low, curve.high, color=BLUE, alpha=0.2, lw=0)
        axes.plot(share, curve.mean, color=BLUE, lw=1.4)
        axes.set_title(name, fontsize=7, pad=3)
        marks = [(100 * posterior.recommended[name] / seen.sizes[column], BLUE, "o", "recommended")]
        if uniform is not None:
            marks.append((uniform[column], ORANGE, "D", "uniform"))
        for at, colour, mark, label in marks:
            height = np.interp(at, share, curve.mean)
            axes.plot(at, height, mark, color=colour, ms=4.5, label=label, zorder=3)
        axes.tick_params(labelsize=7)
        axes.set_xlim(0, 103)
        axes.set_xticks([0, 50, 100])
    for axes in grid[len(names) :]:
        axes.set_visible(False)
    figure.supxlabel("channels kept, %", fontsize=8)
    figure.supylabel(seen.gain_label.replace(", ", ",\n"), fontsize=8)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, fontsize=8)
    figure.suptitle(
        f"What each group is worth, as the model believes\n{seen.title}", fontsize=9, x=0.02, ha="left"
    )


def _interval(trial: Any) -> tuple[float, float]:
    """Return how far the predicted latency's interval reaches down and up, in ms."""
    low, at, high = (trial.user_attrs[f"latency_{end}ms"] for end in ("low_", "", "high_"))
    return max(0.0, at - low), max(0.0, high - at)


def _seeds(count: int) -> str:
    return f"{count} seeds, mean ± deviation" if count > 1 else "1 seed"


def _legend(axes: Any) -> None:
    """Put the legend below, where it hides nothing, in as many columns as the figure has room for."""
    longest = max(map(len, axes.get_legend_handles_labels()[1]), default=0)
    columns = int(72 * axes.figure.get_figwidth() / (LETTER_PT * longest + MARK_PT))
    axes.figure.legend(loc="outside lower center", ncols=min(max(columns, 1), 4), fontsize=8)


def _name_groups(axes: Any, seen: Overview) -> None:
    step = -(-len(seen.names) // NAMED)
    places = list(range(0, len(seen.names), step))
    axes.set_xticks(places, [seen.names[place] for place in places], rotation=90, fontsize=8)


def _wide(seen: Overview) -> tuple[float, float]:
    return min(14.0, max(6.0, 0.28 * len(seen.names) + 2)), 4.6


PICTURES: Mapping[str, Picture] = {
    "history": Picture(
        "History",
        "The value of each trial in order. Dashes and band: uniform widths, mean and deviation over their "
        "seeds; this is the noise. The best of many noisy trials lies above the truth.",
        history,
    ),
    "accuracy": Picture(
        "Accuracy against cost",
        "Every trial meets the targets, a latency as predicted, so all stand close together. Uniform widths "
        "and what pruners say are marked, with the deviation over seeds where there are several.",
        accuracy,
    ),
    "finals": Picture(
        "Finals",
        "The finalists, trained anew with fresh seeds and measured once on the test set. This is the result.",
        finals,
        lambda seen: (7.2, 1.6 + 0.5 * len(seen.arms)),
        lambda seen: any(arm.accuracies for arm in seen.arms),
    ),
    "widths": Picture(
        "Widths",
        "What the model's recommendation keeps of each channel group, in order of execution, and the uniform "
        "widths at the same target.",
        widths,
        _wide,
    ),
    "utility": Picture(
        "What each group is worth",
        "The gain over the least width that the model believes in, with an 80 % interval. A steep curve is a "
        "group that should stay wide. A band as wide as the curve is high: nothing is known of this group.",
        utility,
        lambda seen: (9.0, 1.6 + 1.25 * -(-len(seen.believed) // 6)),
        lambda seen: bool(seen.believed),
    ),
    "keeps": Picture(
        "What each trial keeps",
        "A row a trial, the best on top; a column a channel group. A column that is light at the top "
        "and dark at the bottom is a group that pays for its channels.",
        keeps,
        lambda seen: (_wide(seen)[0] + 1.6, min(12.0, 2.6 + 0.08 * len(seen.trials))),
    ),
    "importance": Picture(
        "Which groups matter",
        "The share of the values' spread that each group explains (PED-ANOVA). With few or noisy trials much "
        "of it is chance.",
        importance,
        lambda seen: (7.2, 1.4 + 0.18 * len(seen.importance)),
        lambda seen: bool(seen.importance),
    ),
    "parallel": Picture(
        "Trials by the most important groups",
        "A line a trial, light where its value is high. Only the most important groups have an axis.",
        parallel,
        shown=lambda seen: len(seen.important) > 1,
    ),
}
"""All pictures, in the order in which a page shows them."""
