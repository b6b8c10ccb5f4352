"""The pictures of a search as figures of plotly, which answer to the mouse."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from archsearch.errors import UsageError
from archsearch.search.overview import Overview
from archsearch.search.palette import BLUE, GREY, MAP, ORANGE, SYMBOLS, colour_of, of_start
from archsearch.search.pictures import PICTURES


def figures(seen: Overview) -> dict[str, Any]:
    """Return the pictures that have something to show as figures of plotly, by name.

    Raises:
        UsageError: If plotly is not installed.
    """
    plotly()
    return {name: make(seen) for name, make in FIGURES.items() if PICTURES[name].shown(seen)}


def plotly() -> Any:
    """Return plotly's graph objects.

    Raises:
        UsageError: If it is not installed.
    """
    try:
        from plotly import graph_objects
    except ImportError:
        raise UsageError("the page needs plotly: pip install 'archsearch[plots]'") from None
    return graph_objects


def _figure(x: str, y: str, height: int = 460, **layout: Any) -> Any:
    figure = plotly().Figure()
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 70, "r": 20, "t": 30, "b": 60},
        xaxis_title=x,
        yaxis_title=y,
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.0},
        **layout,
    )
    return figure


def _told(seen: Overview, trial: Any) -> str:
    """Return what the mouse is told of a trial."""
    facts = trial.user_attrs
    lines = [f"trial {trial.number}: {trial.value:.4g}", str(facts.get("origin", ""))]
    lines.append(f"{facts['macs']:,} MACs, {100 * facts['macs_kept']:.2f} %")
    lines.append(f"{facts['params']:,} parameters")
    if "latency_ms" in facts:
        lines.append(
            f"{facts['latency_ms']:.4g} ms ({facts['latency_low_ms']:.4g} to {facts['latency_high_ms']:.4g})"
        )
    return "<br>".join(html.escape(line) for line in lines)


def _history(seen: Overview) -> Any:
    figure = _figure("trial", seen.unit)
    for name, colour, size, symbol, those in _families(seen):
        figure.add_scatter(
            x=[trial.number for trial in those],
            y=[trial.value for trial in those],
            mode="markers",
            name=name,
            marker={"color": colour, "size": size, "symbol": symbol},
            text=[_told(seen, trial) for trial in those],
            hoverinfo="text",
        )
    figure.add_scatter(
        x=[trial.number for trial in seen.trials],
        y=np.maximum.accumulate(seen.values).tolist(),
        mode="lines",
        name="best so far (mostly luck)",
        line={"color": GREY, "shape": "hv", "width": 1},
    )
    if (uniform := seen.uniform) is not None:
        figure.add_hline(uniform.mean, line={"color": ORANGE, "dash": "dash", "width": 1})
        low, high = uniform.mean - uniform.deviation, uniform.mean + uniform.deviation
        figure.add_hrect(low, high, fillcolor=ORANGE, opacity=0.15, line_width=0)
    return figure


def _accuracy(seen: Overview) -> Any:
    figure = _figure(seen.cost_label, seen.unit)
    figure.add_scatter(
        x=[seen.cost(trial) for trial in seen.searched],
        y=[trial.value for trial in seen.searched],
        mode="markers",
        name="searched",
        marker={"color": BLUE, "size": 7},
        text=[_told(seen, trial) for trial in seen.searched],
        hoverinfo="text",
    )
    for number, start in enumerate(seen.starts):
        figure.add_scatter(
            x=[seen.cost(start.trials[0])],
            y=[start.mean],
            error_y={"array": [start.deviation], "visible": len(start.values) > 1},
            mode="markers",
            name=f"{start.name} ({len(start.values)} seeds)" if len(start.values) > 1 else start.name,
            marker={
                "color": of_start(number),
                "size": 12,
                "symbol": SYMBOLS[number % len(SYMBOLS)],
            },
        )
    return figure


def _finals(seen: Overview) -> Any:
    arms = [arm for arm in seen.arms if arm.accuracies][::-1]
    figure = _figure("test accuracy, %: mean ± deviation over seeds", "", 160 + 50 * len(arms))
    for arm in arms:
        colour = colour_of(arm)
        figure.add_scatter(
            x=[arm.mean],
            y=[arm.name],
            error_x={"array": [arm.deviation or 0], "visible": arm.deviation is not None},
            mode="markers",
            marker={"color": colour, "size": 11, "symbol": "diamond"},
            text=[f"{html.escape(arm.name)}<br>{arm.accuracy} %<br>{arm.macs:,} MACs"],
            hoverinfo="text",
            showlegend=False,
        )
    return figure.update_yaxes(automargin=True)


def _widths(seen: Overview) -> Any:
    figure = _figure("", "channels kept, %")
    recommended, uniform = seen.recommended, seen.uniform_keeps
    if recommended is not None:
        figure.add_bar(x=seen.names, y=recommended, name="recommended by the model", marker_color=BLUE)
    if uniform is not None:
        mark = {"symbol": "line-ew-open", "size": 16, "color": ORANGE, "line": {"width": 3, "color": ORANGE}}
        figure.add_scatter(x=seen.names, y=uniform, name="uniform", mode="markers", marker=mark)
    return figure.update_yaxes(range=[0, 105]).update_xaxes(tickangle=-90, automargin=True)


def _utility(seen: Overview) -> Any:
    from plotly.subplots import make_subplots

    posterior, names = seen.posterior, seen.believed
    if posterior is None:
        return make_subplots(1, 1)
    across = min(6, len(names))
    down = -(-len(names) // across)
    figure = make_subplots(
        down, across, shared_yaxes="all", subplot_titles=names,
        horizontal_spacing=0.02, vertical_spacing=min(0.12, 0.45 / down),
        x_title="channels kept, %", y_title=seen.gain_label,
    )  # fmt: skip
    uniform = seen.uniform_keeps
    for number, name in enumerate(names):
        curve, column = posterior.curves[name], seen.names.index(name)
        share = (100 * np.array(curve.widths) / seen.sizes[column]).tolist()
        at = {"row": number // across + 1, "col": number % across + 1}
        figure.add_scatter(
            x=share + share[::-1], y=[*curve.high, *list(curve.low)[::-1]], fill="toself",
            line_width=0, fillcolor="rgba(0,114,178,0.2)", hoverinfo="skip", showlegend=False, **at,
        )  # fmt: skip
        figure.add_scatter(
            x=share, y=curve.mean, mode="lines", line_color=BLUE, name=name, showlegend=False, **at
        )
        marks = [(100 * posterior.recommended[name] / seen.sizes[column], BLUE, "recommended")]
        if uniform is not None:
            marks.append((float(uniform[column]), ORANGE, "uniform"))
        for place, colour, label in marks:
            height = float(np.interp(place, share, curve.mean))
            figure.add_scatter(
                x=[place], y=[height], mode="markers", marker={"color": colour, "size": 8}, name=label,
                legendgroup=label, showlegend=number == 0, **at,
            )  # fmt: skip
    figure.update_annotations(font_size=10)
    figure.update_xaxes(range=[0, 105], tickvals=[10, 50, 90], tickangle=0)
    return figure.update_layout(
        template="plotly_white", height=180 + 150 * down, margin={"l": 80, "r": 20, "t": 60, "b": 70},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.04},
    )  # fmt: skip


def _keeps(seen: Overview) -> Any:
    order = np.argsort(-seen.values, kind="stable")
    rows = [f"{seen.trials[row].number}: {seen.values[row]:.4g}" for row in order]
    figure = _figure("", "trial: value, the best on top", min(1100, 260 + 9 * len(rows)))
    figure.add_heatmap(
        x=seen.names,
        y=rows,
        z=seen.keeps[order].round(1).tolist(),
        zmin=0,
        zmax=100,
        colorscale=MAP,
        colorbar={"title": {"text": "channels kept, %", "side": "right"}},
    )
    figure.update_yaxes(autorange="reversed", type="category", automargin=True)
    return figure.update_xaxes(tickangle=-90, automargin=True)


def _importance(seen: Overview) -> Any:
    shares = list(seen.importance.items())[::-1]
    figure = _figure("importance (PED-ANOVA), % of all", "", 160 + 18 * len(shares))
    figure.add_bar(
        x=[100 * share for _, share in shares],
        y=[name for name, _ in shares],
        orientation="h",
        marker_color=BLUE,
    )
    return figure.update_yaxes(automargin=True)


def _parallel(seen: Overview) -> Any:
    columns = seen.important
    axes = [{"label": seen.names[c], "values": seen.keeps[:, c].tolist(), "range": [0, 100]} for c in columns]
    axes.append({"label": "value", "values": seen.values.tolist()})
    figure = _figure("", "")
    figure.add_parcoords(
        dimensions=axes,
        line={
            "color": seen.values.tolist(),
            "colorscale": MAP,
            "showscale": True,
            "colorbar": {"title": {"text": seen.unit, "side": "right"}},
        },
    )
    return figure.update_layout(margin={"l": 70, "r": 20, "t": 70, "b": 40})


def _families(seen: Overview) -> list[tuple[str, str, int, str, Sequence[Any]]]:
    """Return name, colour, size, symbol and trials: those that were searched, then each start."""
    found: list[tuple[str, str, int, str, Sequence[Any]]] = [("searched", BLUE, 7, "circle", seen.searched)]
    for number, start in enumerate(seen.starts):
        colour, symbol = of_start(number), SYMBOLS[number % len(SYMBOLS)]
        found.append((start.name, colour, 11, symbol, start.trials))
    return found


FIGURES: Mapping[str, Callable[[Overview], Any]] = {
    "history": _history,
    "accuracy": _accuracy,
    "finals": _finals,
    "widths": _widths,
    "utility": _utility,
    "keeps": _keeps,
    "importance": _importance,
    "parallel": _parallel,
}
"""The pictures of ``PICTURES``, drawn by plotly."""
