"""The search over trained networks: ``search``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from archsearch.cli.options import (
    data_options,
    model_options,
    space_options,
    target_options,
    training_options,
)
from archsearch.cli.output import say, show_result
from archsearch.cli.studies import conditions, reference, trainer
from archsearch.cli.values import chosen_recipe, named_values, opened_data, run_name, search_space


def add_commands(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the parser of the command."""
    search = commands.add_parser(
        "search",
        help="search widths by training many networks at a target; finals against uniform widths",
        description="Train networks all over the target's surface, fit a model of what each group is worth, "
        "and let it\nrecommend widths. These meet uniform widths and the proxy's in finals with fresh seeds; "
        "where they\ncannot be told apart, uniform is what is exported. The same command goes on where it "
        "was killed.",
    )
    model_options(search)
    target_options(search)
    group = search.add_argument_group("search")
    group.add_argument("--trials", type=int, default=100, metavar="N", help="networks (%(default)s)")
    group.add_argument(
        "--objective",
        default="short",
        metavar="NAME",
        help="what a network is worth: proxy (nothing is trained), short, full (%(default)s)",
    )
    group.add_argument(
        "--short", type=float, default=0.25, metavar="SHARE", help="epochs of short (%(default)s)"
    )
    group.add_argument(
        "--sampler",
        default="model",
        metavar="NAME",
        help="model, or one to compare with: tpe, gp, nsga2, cmaes, random (%(default)s)",
    )
    group.add_argument(
        "--thompson",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of the model's trials drawn from what it believes so far (%(default)s)",
    )
    group.add_argument(
        "--finals", type=int, default=3, metavar="N", help="fresh seeds of each finalist (%(default)s)"
    )
    group.add_argument(
        "--method", default="l1_norm", metavar="NAME", help="pruner whose curves are the proxy (%(default)s)"
    )
    group.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="a hyper-parameter of the method"
    )
    space_options(group)
    data_options(search)
    training = training_options(search, seeds=False)
    training.add_argument(
        "--budget", default="scratch-e", metavar="NAME", help="scratch-e or scratch-b (%(default)s)"
    )
    training.add_argument("--weights", metavar="FILE", help="the reference's weights; torchvision: DEFAULT")
    search.add_argument("--out", type=Path, metavar="DIR", help="the run (runs/MODEL-DATA-search-TARGET)")


def run_search(options: argparse.Namespace) -> None:
    """Search, and name the files written."""
    from archsearch.plan import Plan
    from archsearch.report import comparison
    from archsearch.search.driver import Quest, search
    from archsearch.targets import Target

    texts = {name: getattr(options, name) for name in ("flops", "params", "memory", "channels")}
    plan = Plan(
        targets=[Target.parse(name, text) for name, text in texts.items() if text is not None],  # type: ignore[arg-type]
        method=options.method,
        options=named_values(options.option, "--option"),
        space=search_space(options),
        budget=options.budget,
        published_cost=options.published_cost,
        recipe=chosen_recipe(options, options.data or "digits"),
        seed=options.seed,
    )
    quest = Quest(
        plan,
        trials=options.trials,
        objective=options.objective,
        sampler=options.sampler,
        short=options.short,
        finals=options.finals,
        thompson=options.thompson,
    )
    data = opened_data(options)
    traced, weights = reference(options, data)
    searched = search(
        traced,
        quest,
        trainer(options, data),
        out=options.out or Path("runs") / run_name(options, options.data or "digits", "search"),
        weights=weights,
        conditions=conditions(options, traced.name, data, plan.recipe),
        say=say,
    )
    show_result(comparison(searched.record))
    show_result(searched.outcome.verdict)
    for path in searched.files:
        show_result(f"wrote {path}")


COMMANDS: Mapping[str, Callable[[argparse.Namespace], None]] = {"search": run_search}
"""The command and what runs it."""
