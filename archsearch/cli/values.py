"""From options, as they were typed, to values."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archsearch.cli.output import say
from archsearch.errors import SpecError, UsageError

if TYPE_CHECKING:
    from archsearch.data import DataSource
    from archsearch.rebuild import Traced
    from archsearch.recipe import Recipe
    from archsearch.training.callbacks import Callback


def traced_model(options: argparse.Namespace) -> Traced:
    """Return the model that the options name, traced."""
    from archsearch.api import traced_reference
    from archsearch.models import resolve

    return traced_reference(
        resolve(options.model, trust_code=options.trust_code),
        input_shape=input_shape(options),
        classes=options.classes,
        arguments=named_values(options.argument, "--argument"),
        gathers=options.gather,
        whole_groups=options.whole_groups,
    )[0]


def chosen_recipe(options: argparse.Namespace, data: str) -> Recipe:
    """Return the recipe that suits the data, or was asked for, with the fields that were changed."""
    from archsearch.api import default_recipe
    from archsearch.recipe import RECIPES

    return RECIPES[options.recipe or default_recipe(data)].with_(**recipe_changes(options))


def study_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Return what ``api.find`` and ``api.search`` are both given: targets, space, data and training."""
    targets = ("flops", "params", "memory", "channels", "latency", "table", "other_device")
    plain = (
        "weights",
        "budget",
        "published_cost",
        "recipe",
        "seed",
        "device",
        "classes",
        "gather",
        "whole_groups",
        "trust_code",
        "store",
    )
    return {
        **{name: getattr(options, name) for name in (*targets, *plain)},
        "runtime": runtime_settings(options),
        "space": search_space(options),
        "data": options.data or "digits",
        "data_options": data_arguments(options),
        "recipe_changes": recipe_changes(options),
        "input_shape": input_shape(options),
        "arguments": named_values(options.argument, "--argument"),
        "conditions": {"command": command_line(options.words)},
        "say": say,
        "callbacks": training_callbacks(options),
    }


def runtime_settings(options: argparse.Namespace) -> dict[str, Any] | None:
    """Return what a latency is measured with on this machine; ``None`` where a table says it.

    Raises:
        UsageError: If something is said of a runtime that is not named.
    """
    names = ("runtime", "batch", "dtype", "threads")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    if given and "runtime" not in given:
        raise UsageError(f"--{next(iter(given))}: goes with --runtime NAME")
    return given or None


def recipe_changes(options: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of the recipe that the options change."""
    named = {"epochs": options.epochs, "lr": options.lr, "batch_size": options.batch_size}
    fields = {name: value for name, value in named.items() if value is not None}
    return {**fields, **split_pairs(options.set, "--set")}


def search_space(options: argparse.Namespace) -> Any:
    """Return the space of a file, if any, with the bounds that the options change."""
    from dataclasses import replace

    from archsearch.space import SearchSpace

    space = SearchSpace.read(options.space) if options.space else SearchSpace()
    given = {name: getattr(options, name) for name in ("round_to", "min_width", "min_keep")}
    bounds = replace(space.bounds, **{name: value for name, value in given.items() if value is not None})
    return replace(
        space,
        bounds=bounds,
        ignore=(*space.ignore, *(options.ignore or ())),
        drop_branches=space.drop_branches or options.drop_branches,
    )


def data_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Return what ``load_data`` is given beside the name."""
    return {
        "data_dir": options.data_dir,
        "download": options.download,
        "image_size": options.image_size,
        "workers": options.workers,
        "validation_share": options.validation_share,
        "train_share": options.train_share,
    }


def opened_data(options: argparse.Namespace) -> DataSource:
    """Return the data set that the options name; say which."""
    from archsearch.data import load_data

    data = load_data(options.data or "digits", **data_arguments(options))
    say(data.announcement)
    return data


def input_shape(options: argparse.Namespace) -> tuple[int, ...] | None:
    """Return ``--input-shape`` as numbers."""
    if options.input_shape is None:
        return None
    try:
        shape = tuple(int(part) for part in options.input_shape.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise UsageError(f"--input-shape {options.input_shape}: give whole numbers such as 3,224,224")
    return shape


def named_values(pairs: Sequence[str], option: str) -> dict[str, Any]:
    """Return ``NAME=VALUE`` words with values read as in an architecture file."""
    from archsearch.bounded_yaml import parse

    found = {}
    for name, text in split_pairs(pairs, option).items():
        try:
            found[name] = parse(f"value: {text}", option).data["value"]
        except SpecError:
            raise UsageError(f"{option} {name}={text}: give a plain value such as 3, true or B") from None
    return found


def split_pairs(pairs: Sequence[str], option: str) -> dict[str, str]:
    """Return ``NAME=VALUE`` words as texts by name."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UsageError(f"{option} {pair}: give NAME=VALUE")
        found[name.replace("-", "_")] = value
    return found


def run_name(options: argparse.Namespace, data: str | None, what: str) -> str:
    """Return a directory name that says what the run is."""
    from archsearch import files

    target = getattr(options, "preset", None) or "-".join(
        f"{name}-{getattr(options, name)}"
        for name in ("flops", "params", "memory", "channels", "latency")
        if getattr(options, name, None)
    )
    parts = [options.model or "", data or "", what, target]
    return "-".join(files.plain(part) for part in parts if part)


def command_line(words: Sequence[str]) -> str:
    """Return the command as it can be typed again; a very long one is cut to what a file may hold."""
    command = shlex.join(["archsearch", *words])
    return command if len(command) <= 1024 else f"{command[:1020]} …"


def training_callbacks(options: argparse.Namespace) -> Callable[[str, Path], Sequence[Callback]]:
    """Return what makes the callbacks of each training."""

    def make(label: str, directory: Path) -> Sequence[Callback]:
        from archsearch.training.callbacks import TensorBoard
        from archsearch.training.progress import ProgressBar

        bar: Callback = ProgressBar(label)
        return [bar, TensorBoard(options.tensorboard / directory.name)] if options.tensorboard else [bar]

    return make
