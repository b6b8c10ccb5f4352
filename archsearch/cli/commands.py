"""What each command does: take the options, call one function, print."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from archsearch.cli import (
    compression_commands,
    dashboard_commands,
    find_commands,
    guide_commands,
    latency_commands,
    profile_commands,
    search_commands,
    sparsity_commands,
)
from archsearch.cli.output import say, show_result
from archsearch.cli.values import (
    chosen_recipe,
    opened_data,
    traced_model,
    training_callbacks,
)
from archsearch.errors import UsageError


def run_train(options: argparse.Namespace) -> None:
    """Train the network of an architecture file."""
    from archsearch.downstream import train_architecture
    from archsearch.report import comparison

    data = opened_data(options)
    out = options.out or options.architecture.with_suffix("")
    record = train_architecture(
        options.architecture,
        data,
        chosen_recipe(options, data.name),
        budget=options.budget,
        published_cost=options.published_cost,
        weights=options.weights,
        seeds=options.seeds,
        seed=options.seed,
        device=options.device,
        trust_code=options.trust_code,
        out=out,
        store=options.store,
        say=say,
        callbacks=training_callbacks(options),
    )
    show_result(comparison(record))
    for name in ("weights.safetensors", "results.json", "results.md"):
        show_result(f"wrote {out / name}")


def run_evaluate(options: argparse.Namespace) -> None:
    """Measure a trained architecture on the test set."""
    from archsearch.downstream import evaluate_architecture

    data = opened_data(options)
    measured = evaluate_architecture(
        options.architecture, options.weights, data, device=options.device, trust_code=options.trust_code
    )
    show_result(
        f"{data.name}: {measured.accuracy:.2f} % of {measured.images:,} test images, loss {measured.loss:.4f}"
    )


def run_show(options: argparse.Namespace) -> None:
    """Show an architecture file, or the channel groups of a model; draw them if asked."""
    if (options.architecture is None) == (options.model is None):
        raise UsageError("give an architecture file, or --model NAME")
    from archsearch.pictures import check_picture
    from archsearch.report import (
        describe_architecture,
        describe_model,
        draw_graph,
        plot_widths,
    )

    for picture in (options.plot, options.graph):
        check_picture(picture)
    if options.architecture is not None:
        traced, widths = describe_architecture(Path(options.architecture), options.trust_code, show_result)
    else:
        traced, widths = describe_model(traced_model(options), show_result)
    if options.plot is not None:
        plot_widths(traced, widths, options.plot, options.architecture or options.model)
        show_result(f"wrote {options.plot}")
    if options.graph is not None:
        draw_graph(traced, options.graph)
        show_result(f"wrote {options.graph}")


def run_list(options: argparse.Namespace) -> None:
    """Print the names of one kind."""
    from archsearch.catalogue import CATALOGUES

    for line in CATALOGUES[options.kind](options.pattern):
        print(line)


COMMANDS: Mapping[str, Callable[[argparse.Namespace], None]] = {
    **find_commands.COMMANDS,
    **search_commands.COMMANDS,
    **dashboard_commands.COMMANDS,
    "train": run_train,
    "evaluate": run_evaluate,
    "show": run_show,
    **sparsity_commands.COMMANDS,
    **guide_commands.COMMANDS,
    **compression_commands.COMMANDS,
    **latency_commands.COMMANDS,
    **profile_commands.COMMANDS,
    "list": run_list,
}
