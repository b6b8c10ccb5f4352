"""The commands about single weights: ``sparsify`` and ``lottery``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archsearch.cli.options import data_options, model_options, training_options
from archsearch.cli.output import say, show_result
from archsearch.cli.studies import conditions, reference, run_directory, trainer
from archsearch.cli.values import chosen_recipe, opened_data

if TYPE_CHECKING:
    from archsearch.sparsity.rule import Rule

NO_CONTROLS = "none"


def add_commands(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the parsers of both commands."""
    sparsify = commands.add_parser(
        "sparsify",
        help="mask single weights, train what stays, compare with chance",
        description="Train (or load) the reference, choose the single weights that stay, and compare the "
        "masked network,\nfine-tuned and from fresh weights, with random masks and with the reference.",
    )
    model_options(sparsify)
    group = sparsify.add_argument_group("masks")
    group.add_argument(
        "--keep", type=float, required=True, metavar="SHARE", help="weights that stay, such as 0.3"
    )
    _rule_options(group)
    group.add_argument(
        "--steps",
        type=int,
        default=1,
        metavar="N",
        help="mask in N steps, each taking the same share (%(default)s)",
    )
    group.add_argument(
        "--recover",
        type=int,
        default=1,
        metavar="N",
        help="epochs of training between two steps (%(default)s)",
    )
    group.add_argument(
        "--images",
        type=int,
        default=128,
        metavar="N",
        help="training images that snip looks at (%(default)s)",
    )
    data_options(sparsify)
    training = training_options(sparsify)
    training.add_argument(
        "--budget",
        default="scratch-b",
        metavar="NAME",
        help="training of the masked network: scratch-e, scratch-b (as many FLOPs), finetune, none "
        "(%(default)s)",
    )
    training.add_argument(
        "--budget-cap", type=float, metavar="X", help="most epochs, in multiples of the recipe's"
    )
    training.add_argument(
        "--finetune", default="finetune", metavar="NAME", help="the fine-tuned arm (%(default)s)"
    )
    training.add_argument("--weights", metavar="FILE", help="the reference's weights; torchvision: DEFAULT")
    sparsify.add_argument(
        "--out", type=Path, metavar="DIR", help="results (runs/sparsify-MODEL-DATA-METHOD-KEEP)"
    )

    lottery = commands.add_parser(
        "lottery",
        help="prune in rounds and train again from early weights: lottery tickets",
        description="Train the network, prune it, give what stays its early weights back, train again, and "
        "so on,\nbeside controls: the curve of accuracy against the share of weights left.",
    )
    model_options(lottery)
    group = lottery.add_argument_group("rounds")
    group.add_argument("--rounds", type=int, default=10, metavar="N", help="how often to prune (%(default)s)")
    group.add_argument(
        "--keep-per-round",
        type=float,
        default=0.8,
        metavar="SHARE",
        help="share that a round leaves (%(default)s)",
    )
    group.add_argument(
        "--rewind",
        default="0",
        metavar="STEP",
        help="early weights: 0, 500it (steps) or 1ep (epochs) (%(default)s)",
    )
    group.add_argument(
        "--structured", action="store_true", help="remove whole channels; shares are of the MACs"
    )
    group.add_argument(
        "--controls",
        default="reinit,random",
        metavar="NAMES",
        help="reinit, random, lr-rewind, finetune, joined by commas, or none (%(default)s)",
    )
    _rule_options(group)
    data_options(lottery)
    training = training_options(lottery)
    training.add_argument(
        "--finetune", default="finetune", metavar="NAME", help="how finetune trains (%(default)s)"
    )
    lottery.add_argument("--out", type=Path, metavar="DIR", help="results (runs/lottery-MODEL-DATA)")
    lottery.add_argument("--no-plot", action="store_true", help="draw no curve.png, which needs matplotlib")


def run_sparsify(options: argparse.Namespace) -> None:
    """Mask a network, compare it, and name the files written."""
    from archsearch.report import comparison
    from archsearch.sparsity.sparsify import SparsityPlan, sparsify

    data = None if options.budget == "none" and options.data is None else opened_data(options)
    recipe = chosen_recipe(options, data.name if data else "")
    plan = SparsityPlan(
        keep=options.keep,
        rule=_rule(options),
        steps=options.steps,
        recover=options.recover,
        images=options.images,
        budget=options.budget,
        budget_cap=options.budget_cap,
        published_cost=options.published_cost,
        recipe=recipe,
        finetune=options.finetune,
        seeds=options.seeds,
        seed=options.seed,
    )
    traced, weights = reference(options, data)
    name = f"sparsify-{options.model}-{data.name if data else 'none'}-{options.method}-{options.keep:g}"
    result = sparsify(
        traced,
        plan,
        trainer(options, data) if data else None,
        weights=weights,
        trained=options.weights is not None and weights is None,
        out=options.out or run_directory(name),
        conditions=conditions(options, traced.name, data, recipe),
        say=say,
    )
    show_result(comparison(result.record))
    for path in result.files:
        show_result(f"wrote {path}")


def run_lottery(options: argparse.Namespace) -> None:
    """Prune in rounds, draw the curve, and name the files written."""
    from archsearch.pictures import check_picture
    from archsearch.report import comparison
    from archsearch.sparsity.curve import plot_points
    from archsearch.sparsity.lottery import LotteryPlan, lottery
    from archsearch.trainer import is_main

    data = opened_data(options)
    recipe = chosen_recipe(options, data.name)
    plan = LotteryPlan(
        rounds=options.rounds,
        keep_per_round=options.keep_per_round,
        rewind=options.rewind,
        rule=_rule(options),
        structured=options.structured,
        controls=[] if options.controls == NO_CONTROLS else options.controls.split(","),
        finetune=options.finetune,
        recipe=recipe,
        seeds=options.seeds,
        seed=options.seed,
    )
    kind = "structured-lottery" if options.structured else "lottery"
    out = options.out or run_directory(f"{kind}-{options.model}-{data.name}")
    picture = None if options.no_plot else out / "curve.png"
    if picture is not None:
        out.mkdir(parents=True, exist_ok=True)
        check_picture(picture)
    traced, _ = reference(options, data)
    result = lottery(
        traced,
        plan,
        trainer(options, data),
        out=out,
        conditions=conditions(options, traced.name, data, recipe),
        say=say,
    )
    show_result(comparison(result.record))
    if picture is not None and is_main():
        plot_points(result.points, picture, f"{traced.name} on {data.name}")
        show_result(f"wrote {picture}")
    for path in result.files:
        show_result(f"wrote {path}")


COMMANDS: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "sparsify": run_sparsify,
    "lottery": run_lottery,
}


def _rule_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--method", default="magnitude", metavar="NAME", help="magnitude, snip or random (%(default)s)"
    )
    group.add_argument(
        "--allocation",
        default="global",
        metavar="NAME",
        help="global: one threshold; layer: the same share of every layer (%(default)s)",
    )
    group.add_argument(
        "--scope", default="all", metavar="NAME", help="all weight matrices, or conv (%(default)s)"
    )
    group.add_argument(
        "--output-rate",
        default="full",
        metavar="NAME",
        help="what goes of the output layer: full, half or none of its share (%(default)s)",
    )


def _rule(options: argparse.Namespace) -> Rule:
    from archsearch.sparsity.rule import Rule

    return Rule(options.method, options.allocation, options.scope, options.output_rate)
