"""The main job and its comparison: ``find`` and ``compare``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from archsearch.cli.options import (
    data_options,
    latency_options,
    model_options,
    space_options,
    target_options,
    training_options,
)
from archsearch.cli.output import show_result
from archsearch.cli.search_options import search_options, search_values
from archsearch.cli.values import named_values, run_name, study_arguments


def add_commands(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the parsers of both commands."""
    find = commands.add_parser(
        "find",
        help="prune a network, keep the widths, train them from scratch, compare",
        description="Train (or load) the reference, prune it to a target, keep only the widths, rebuild a "
        "fresh network,\ntrain it from scratch, and compare it with fine-tuning, uniform widths and the "
        "reference.",
    )
    model_options(find)
    target = target_options(find)
    latency_options(target)
    target.add_argument(
        "--preset", metavar="NAME", help="published widths, such as resnet56-a; implies the model"
    )
    method = find.add_argument_group("method")
    method.add_argument("--method", default="l1_norm", metavar="NAME", help="pruner, or search (%(default)s)")
    method.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="a hyper-parameter of the method"
    )
    method.add_argument("--allocation", metavar="NAME", help="how scores become widths (the method's own)")
    _pruning_options(method)
    search_options(find)
    _training_options(find, "scratch-b")
    find.add_argument("--out", type=Path, metavar="DIR", help="results (runs/MODEL-DATA-METHOD-TARGET)")

    compare = commands.add_parser(
        "compare",
        help="find with several methods at one target, side by side",
        description="Run `find` with several methods at one target. The reference and the uniform widths are "
        "trained once;\nequal widths of two methods are one network, trained once.",
    )
    model_options(compare)
    latency_options(target_options(compare))
    method = compare.add_argument_group("methods")
    method.add_argument(
        "--methods",
        default="all",
        metavar="A,B,…",
        help="pruners, or NAME:ALLOCATION (%(default)s)",
    )
    _pruning_options(method)
    _training_options(compare, "scratch-e")
    compare.add_argument("--out", type=Path, metavar="DIR", help="results (runs/MODEL-DATA-compare-TARGET)")


def run_find(options: argparse.Namespace) -> None:
    """Find an architecture, compare it, and name the files written."""
    from archsearch.api import find
    from archsearch.report import comparison

    arguments = _arguments(options)
    found = find(
        options.model,
        preset=options.preset,
        method=options.method,
        options=named_values(options.option, "--option"),
        search=search_values(options) if options.method == "search" else None,
        allocation=options.allocation,
        out=options.out or Path("runs") / run_name(options, arguments["data"], options.method),
        **arguments,
    )
    show_result(comparison(found.record))
    for path in found.files:
        show_result(f"wrote {path}")


def run_compare(options: argparse.Namespace) -> None:
    """Compare methods at one target, and name the files written."""
    from archsearch.methods import compare
    from archsearch.report import comparison

    arguments = _arguments(options)
    out = options.out or Path("runs") / run_name(options, arguments["data"], "compare")
    record, paths = compare(options.model, options.methods, out=out, **arguments)
    show_result(comparison(record))
    for path in paths:
        show_result(f"wrote {path}")


def _pruning_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--steps", type=int, default=1, metavar="N", help="prune in N steps with recovery (%(default)s)"
    )
    group.add_argument(
        "--recover", type=int, default=1, metavar="N", help="epochs of each recovery (%(default)s)"
    )
    group.add_argument(
        "--recalibrate", action="store_true", help="fresh batch-norm statistics after each cut"
    )
    space_options(group)


def _training_options(parser: argparse.ArgumentParser, budget: str) -> None:
    data_options(parser)
    training = training_options(parser)
    training.add_argument(
        "--budget",
        default=budget,
        metavar="NAME",
        help="training of what was found: scratch-e (as many epochs), scratch-b (as many FLOPs), finetune, "
        "none (%(default)s)",
    )
    training.add_argument(
        "--budget-cap", type=float, metavar="X", help="most epochs, in multiples of the recipe's"
    )
    training.add_argument(
        "--finetune", default="finetune", metavar="NAME",
        help="the fine-tuned arm: finetune (lr .01), finetune-published (lr .001 constant) or none",
    )  # fmt: skip
    training.add_argument("--weights", metavar="FILE", help="the reference's weights; torchvision: DEFAULT")


def _arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Return what both commands give ``api.find``."""
    return {
        **study_arguments(options),
        "steps": options.steps,
        "recover": options.recover,
        "recalibrate": options.recalibrate,
        "data": options.data or (None if options.budget == "none" else "digits"),
        "budget_cap": options.budget_cap,
        "finetune": options.finetune,
        "seeds": options.seeds,
    }


COMMANDS: Mapping[str, Callable[[argparse.Namespace], None]] = {"find": run_find, "compare": run_compare}
