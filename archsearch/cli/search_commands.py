"""The search over trained networks: ``search``, and what is known of one that runs or has ended."""

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
from archsearch.errors import UsageError
from archsearch.search import defaults

ACTIONS = ("status", "best", "export")


def add_commands(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the parser of the command."""
    search = commands.add_parser(
        "search",
        help="search widths by training many networks at a target; finals against uniform widths",
        description="Train networks all over the target's surface, fit a model of what each group is worth, "
        "and let it\nrecommend widths. These meet uniform widths and the proxy's in finals with fresh seeds; "
        "where they\ncannot be told apart, uniform is what is exported. The same command goes on where it "
        "was killed.\n\n`archsearch search status RUN` tells how far a search or a front is, "
        "`best RUN` what its model recommends\nso far, `export RUN` writes that as an architecture file. "
        "They only read, also beside a running search.",
    )
    search.add_argument(
        "action",
        nargs="?",
        type=_action,
        choices=ACTIONS,
        metavar="ACTION",
        help="status, best or export, of RUN; without, search",
    )
    search.add_argument("run", nargs="?", type=Path, metavar="RUN", help="run directory of a search")
    search.add_argument("--trial", type=int, metavar="N", help="with export: a trial's widths")
    model_options(search)
    target = target_options(search)
    latency_options(target)
    target.add_argument(
        "--pareto", metavar="COST,accuracy", help="a front: flops, params or latency at several --targets"
    )
    target.add_argument(
        "--targets", metavar="A,B,…", help="with --pareto: what may stay; --trials is for each of them"
    )
    group = search_options(search)
    group.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="a hyper-parameter of the proxy"
    )
    space_options(group)
    data_options(search)
    training = training_options(search, seeds=False)
    training.add_argument(
        "--budget", default=defaults.BUDGET, metavar="NAME", help="scratch-e or scratch-b (%(default)s)"
    )
    training.add_argument("--weights", metavar="FILE", help="the reference's weights; torchvision: DEFAULT")
    search.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="the run (runs/MODEL-DATA-search-TARGET); with export the architecture file",
    )


def run_search(options: argparse.Namespace) -> None:
    """Search, and name the files written; or tell what is known of a search."""
    if options.action is not None:
        _look(options)
        return
    from archsearch.api import search
    from archsearch.report import comparison

    given = {"options": named_values(options.option, "--option"), **study_arguments(options)}
    if options.pareto is not None or options.targets is not None:
        _search_front(options, given)
        return
    out = options.out or Path("runs") / run_name(options, options.data or "digits", "search")
    searched = search(options.model, out=out, **search_values(options), **given)
    show_result(comparison(searched.record))
    show_result(searched.outcome.verdict)
    for path in searched.files:
        show_result(f"wrote {path}")


def _search_front(options: argparse.Namespace, given: Mapping[str, Any]) -> None:
    """Search at several targets; show each target's finals, and name the files of the front."""
    from archsearch.api import front
    from archsearch.report import comparison
    from archsearch.search.pareto import resource_of

    if options.pareto is None or not options.targets:
        raise UsageError("--pareto and --targets go together: --pareto flops,accuracy --targets 0.3,0.5,0.7")
    resource = resource_of(options.pareto)
    found = front(
        options.model,
        resource=resource,
        targets=[text for text in options.targets.split(",") if text],
        out=options.out or Path("runs") / run_name(options, options.data or "digits", f"front-{resource}"),
        search=search_values(options),
        **given,
    )
    for place, searched in found.searches.items():
        show_result(f"{resource} {place}")
        show_result(comparison(searched.record))
        show_result(searched.outcome.verdict)
    for path in found.files:
        show_result(f"wrote {path}")


def _look(options: argparse.Namespace) -> None:
    """Tell how a search stands, without writing in its directory."""
    from archsearch.search.dashboard import runs_of
    from archsearch.search.standing import Standing

    if options.run is None:
        raise UsageError(f"search {options.action}: give the run directory, such as runs/NAME")
    if options.trial is not None and options.action != "export":
        raise UsageError("--trial goes with `search export`")
    if options.action == "status":
        runs = runs_of(options.run)
        for run in runs:
            if len(runs) > 1:
                show_result(f"{run}:")
            for line in Standing.read(run).status():
                show_result(line)
        return
    standing = Standing.read(options.run)
    if options.action == "best":
        show_result(standing.best(trust_code=options.trust_code))
    else:
        path = options.out or Path("architecture.yaml")
        standing.export(path, options.trial, trust_code=options.trust_code)
        show_result(f"wrote {path}")


def _action(word: str) -> str:
    """Return an action as it was typed.

    Raises:
        UsageError: If it names a model, which an option does.
    """
    if word not in ACTIONS and _names_model(word):
        raise UsageError(f"'{word}' is a model, not an action: give --model {word}")
    return word


def _names_model(word: str) -> bool:
    from archsearch.models import resolve

    if ":" in word:
        return True  # code, which is not imported to find out
    try:
        resolve(word)
    except UsageError:
        return False
    return True


COMMANDS: Mapping[str, Callable[[argparse.Namespace], None]] = {"search": run_search}
"""The command and what runs it."""
