"""What a person sees: tables on the terminal, and pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from archsearch.architecture import Architecture
from archsearch.counters import flop_counter_macs, thop_macs
from archsearch.errors import SpecError
from archsearch.graph import ChannelGraph
from archsearch.pictures import pyplot
from archsearch.rebuild import Traced, trace_architecture
from archsearch.results import Record


def comparison(record: Record) -> Table:
    """Return the arms of a run as a table."""
    table = Table(
        title="On the test set" if any(arm.accuracies for arm in record.arms) else None, title_justify="left"
    )
    columns, *rows = record.table()
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def describe_architecture(
    path: Path, trust_code: bool, show: Callable[[Any], None]
) -> tuple[Traced, dict[str, int]]:
    """Show an architecture file, after checking that it still is what it says.

    Returns:
        Its traced reference and its widths.

    Raises:
        ArchsearchError: If the file is wrong, or its network not what it should be.
    """
    architecture = Architecture.read(path)
    traced = trace_architecture(architecture, trust_code=trust_code, where=str(path))
    widths = {name: group.width for name, group in architecture.widths.items()}
    show(f"{path}: {architecture.model}, key {architecture.key}")
    _show_widths(traced, widths, show)
    gone = traced.graph.vanished(widths)
    if gone:
        show(f"residual branches that are gone: {', '.join(branch.name for branch in gone)}")
    verified = traced.verify({name: np.arange(width) for name, width in widths.items()})
    if not verified.ok:
        raise SpecError(f"{path}: the network {verified.problem}")
    show(f"verified: equal to the reference without the dropped channels, to {verified.error:.0e}")
    return traced, widths


def describe_model(traced: Traced, show: Callable[[Any], None]) -> tuple[Traced, dict[str, int]]:
    """Show the channel groups of a model, and what stays."""
    show(traced.name)
    _show_widths(traced, traced.graph.sizes, show)
    graph = traced.with_branches().graph
    if graph.branches or graph.frozen_branches:
        show(branch_table(graph))
    for op, why in traced.graph.unknown_ops.items():
        show(f"{op}: {why}; what it touches stays")
    return traced, traced.graph.sizes


def _show_widths(traced: Traced, widths: Mapping[str, int], show: Callable[[Any], None]) -> None:
    show(group_table(traced, widths))
    show(frozen_table(traced))
    show(cost_table(traced, widths))


def cost_table(traced: Traced, widths: Mapping[str, int]) -> Table:
    """Return the costs beside the reference's, and what other counters say of the small network's MACs."""
    cost, reference = traced.cost.of(widths), traced.cost.reference
    table = Table(title=f"Cost of one input {' x '.join(map(str, traced.input_shape))}", title_justify="left")
    table.add_column("", no_wrap=True)
    for column in ("network", "reference", "kept"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, value, whole in (
        ("MACs", cost.macs, reference.macs),
        ("parameters", cost.params, reference.params),
        ("peak activation bytes", cost.peak_activation_bytes, reference.peak_activation_bytes),
        ("FLOPs as Liu et al. count", cost.published_flops, reference.published_flops),
    ):
        table.add_row(name, f"{value:,}", f"{whole:,}", f"{value / whole:.4f}")
    small = traced.inherit({name: np.arange(width) for name, width in widths.items()})
    for name, count in (
        ("torch's FLOP counter / 2", flop_counter_macs),
        ("thop's MACs (with norms)", thop_macs),
    ):
        value, whole = count(small, traced.example), count(traced.model, traced.example)
        table.add_row(name, f"{value:,}", f"{whole:,}", f"{value / whole:.4f}")
    return table


def group_table(traced: Traced, widths: Mapping[str, int]) -> Table:
    """Return one row a group: its width, and the share of all MACs that it takes part in.

    A layer's MACs count for the group that it reads and for the one that it produces.
    """
    now, before = _shares(traced, widths), _shares(traced, traced.graph.sizes)
    table = Table()
    table.add_column("channel group", no_wrap=True)
    for column in ("layers", "width", "of", "kept", "MACs share", "of reference"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, group in traced.graph.groups.items():
        table.add_row(
            name,
            str(len({member.tensor for member in group.producers})),
            str(widths[name]),
            str(group.size),
            f"{widths[name] / group.size:.2f}",
            f"{now[name]:.1%}",
            f"{before[name]:.1%}",
        )
    return table


def frozen_table(traced: Traced) -> Table:
    """Return the layers with channels that stay, and why."""
    table = Table(title="Channels that stay", title_justify="left")
    table.add_column("layer", no_wrap=True)
    table.add_column("channels", justify="right", no_wrap=True)
    table.add_column("why")
    for layer in traced.graph.frozen:
        table.add_row(layer.layer, f"{layer.channels} of {layer.of}", layer.reason)
    return table


def branch_table(graph: ChannelGraph) -> Table:
    """Return the residual branches, and whether they may vanish."""
    table = Table(title="Residual branches", title_justify="left")
    table.add_column("branch", no_wrap=True)
    table.add_column("channel groups", justify="right", no_wrap=True)
    table.add_column("may vanish")
    for branch in graph.branches:
        table.add_row(branch.name, str(len(branch.groups)), "yes")
    for frozen in graph.frozen_branches:
        table.add_row(frozen.name, "", f"no: {frozen.reason}")
    return table


def _shares(traced: Traced, widths: Mapping[str, int]) -> Mapping[str, float]:
    """Return for each group the share of the MACs that would vanish with it."""
    cost = traced.cost
    at = cost.array(widths)
    without = np.repeat(at[None], len(at), axis=0)
    np.fill_diagonal(without, 0)
    total = max(int(cost.macs(at)), 1)
    shares = (total - cost.macs(without)) / total
    return dict(zip(cost.names, shares.tolist(), strict=True))


def plot_widths(traced: Traced, widths: Mapping[str, int], path: Path, title: str) -> None:
    """Draw the kept width of each group before the reference's, in order of execution.

    Raises:
        UsageError: If matplotlib is not installed.
    """
    plots = pyplot()
    names, sizes = list(widths), [traced.graph.sizes[name] for name in widths]
    with plots.rc_context({"font.size": 9}):
        figure, axes = plots.subplots(figsize=(max(6.0, 0.28 * len(names) + 2), 4.2), layout="constrained")
        places = np.arange(len(names))
        axes.bar(places, sizes, width=0.86, color="#d9dee3", label="reference")
        axes.bar(places, [widths[name] for name in names], width=0.86, color="#2f6f9f", label="kept")
        axes.set_xticks(places, names, rotation=90)
        axes.set_xlim(-0.7, len(names) - 0.3)
        axes.set_ylabel("channels")
        axes.set_title(title, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper left")
        figure.savefig(path, dpi=150)
        plots.close(figure)


def draw_graph(traced: Traced, path: Path) -> None:
    """Draw layers (boxes) and channel groups (rounds), top to bottom in order of execution.

    Raises:
        UsageError: If matplotlib is not installed.
    """
    plots = pyplot()
    graph = traced.graph.networkx
    order = {name: number for number, name in enumerate(traced.graph.layers)}
    groups = [node for node, kind in graph.nodes(data="kind") if kind == "group"]
    layers = [node for node, kind in graph.nodes(data="kind") if kind == "layer"]
    layers.sort(key=lambda name: order.get(name, len(order)))
    rank = {layer: float(number) for number, layer in enumerate(layers)}
    for group in groups:
        rank[group] = min(rank[layer] for layer in graph.predecessors(group)) + 0.5
    height = max(4.0, 0.34 * len(layers))
    positions = {layer: (0.0, -rank[layer]) for layer in layers}
    positions |= {group: (1.0, -rank[group]) for group in groups}
    figure, axes = plots.subplots(figsize=(9, height), layout="constrained")
    for tail, head in graph.edges:
        producing = tail in layers
        axes.annotate(
            "",
            positions[head],
            positions[tail],
            arrowprops={
                "arrowstyle": "->",
                "color": "#2f6f9f" if producing else "#b5651d",
                "alpha": 0.55,
                "linewidth": 0.9,
                "shrinkA": 4,
                "shrinkB": 4,
            },
        )
    for node, (x, y) in positions.items():
        is_group = node in groups
        label = f"{node.removeprefix('group:')}  ({graph.nodes[node]['size']})" if is_group else node
        axes.text(
            x,
            y,
            label,
            ha="left" if is_group else "right",
            va="center",
            fontsize=7,
            bbox={
                "boxstyle": "round" if is_group else "square",
                "facecolor": "#e8f0f6" if is_group else "#ffffff",
                "edgecolor": "#8fa3b3",
                "linewidth": 0.6,
            },
        )
    axes.set_xlim(-0.9, 1.9)
    axes.set_ylim(-len(layers), 1.5)
    axes.set_title(
        f"{traced.name}: layers (left) produce (blue) and consume (brown) channel groups (right; units)",
        fontsize=9,
    )
    axes.axis("off")
    figure.savefig(path)
    plots.close(figure)
