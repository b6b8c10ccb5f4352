"""What each command does: take the options, call one function, print."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from archsearch.cli.output import say, show_result
from archsearch.cli.values import (
    chosen_recipe,
    command_line,
    data_arguments,
    input_shape,
    named_values,
    opened_data,
    recipe_changes,
    run_name,
    search_space,
    traced_model,
    training_callbacks,
)
from archsearch.errors import UsageError


def run_find(options: argparse.Namespace) -> None:
    """Find an architecture, compare it, and name the files written."""
    from archsearch.api import find
    from archsearch.report import comparison

    data = options.data or (None if options.budget == "none" else "digits")
    out = options.out or Path("runs") / run_name(options, data)
    found = find(
        options.model,
        flops=options.flops,
        params=options.params,
        memory=options.memory,
        channels=options.channels,
        preset=options.preset,
        method=options.method,
        options=named_values(options.option, "--option"),
        allocation=options.allocation,
        space=search_space(options),
        steps=options.steps,
        recover=options.recover,
        recalibrate=options.recalibrate,
        data=data,
        data_options=data_arguments(options),
        weights=options.weights,
        budget=options.budget,
        budget_cap=options.budget_cap,
        published_cost=options.published_cost,
        finetune=options.finetune,
        recipe=options.recipe,
        recipe_changes=recipe_changes(options),
        seeds=options.seeds,
        seed=options.seed,
        device=options.device,
        input_shape=input_shape(options),
        classes=options.classes,
        arguments=named_values(options.argument, "--argument"),
        trust_code=options.trust_code,
        out=out,
        store=options.store,
        conditions={"command": command_line(options.words)},
        say=say,
        callbacks=training_callbacks(options),
    )
    show_result(comparison(found.record))
    for path in found.files:
        show_result(f"wrote {path}")


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
    from archsearch.report import (
        check_picture,
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
    "find": run_find,
    "train": run_train,
    "evaluate": run_evaluate,
    "show": run_show,
    "list": run_list,
}
