"""What the commands beside ``find`` need of a model, its data and the run, from the options."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archsearch.cli.output import say
from archsearch.cli.values import command_line, input_shape, named_values, training_callbacks
from archsearch.errors import UsageError

if TYPE_CHECKING:
    from archsearch.data import DataSource
    from archsearch.rebuild import Traced
    from archsearch.recipe import Recipe
    from archsearch.trainer import Trainer


def reference(options: argparse.Namespace, data: DataSource | None) -> tuple[Traced, str | None]:
    """Return the traced reference, and the file of its weights where it does not have published ones."""
    from archsearch.api import summary, traced_reference
    from archsearch.models import resolve
    from archsearch.trainer import check_classes

    if options.model is None:
        raise UsageError("no model: give --model NAME, such as resnet20")
    traced, weights = traced_reference(
        resolve(options.model, trust_code=options.trust_code),
        data,
        weights=getattr(options, "weights", None),
        input_shape=input_shape(options),
        classes=options.classes,
        arguments=named_values(options.argument, "--argument"),
        seed=options.seed,
        gathers=options.gather,
        whole_groups=options.whole_groups,
    )
    if data is not None:
        check_classes(traced, data)
    say(summary(traced))
    return traced, weights


def trainer(options: argparse.Namespace, data: DataSource) -> Trainer:
    """Return what trains as the options say."""
    from archsearch.trainer import Trainer

    return Trainer(data, options.device, options.store, say, training_callbacks(options))


def conditions(
    options: argparse.Namespace, model: str, data: DataSource | None, recipe: Recipe
) -> dict[str, Any]:
    """Return what a record says of a run."""
    import time

    from archsearch.results import environment, recipe_facts

    return {
        "command": command_line(options.words),
        "model": model,
        "data": data.name if data else "none",
        **({"recipe": recipe_facts(recipe)} if data else {}),
        "versions": environment(),
        "date": time.strftime("%Y-%m-%d"),
    }


def run_directory(name: str) -> Path:
    """Return the directory of a run's results where none is given."""
    from archsearch import files

    return Path("runs") / files.plain(name)
