"""The options of a search, as ``search`` and ``find --method search`` have them, and their values."""

from __future__ import annotations

import argparse
from typing import Any

from archsearch.cli.values import named_values
from archsearch.search import defaults


def search_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add what says how to search and who trains; return the first group for more of it."""
    group = parser.add_argument_group("search")
    group.add_argument(
        "--trials", type=int, default=defaults.TRIALS, metavar="N", help="networks (%(default)s)"
    )
    group.add_argument(
        "--objective",
        default=defaults.OBJECTIVE,
        metavar="NAME",
        help="what a network is worth: proxy or inherit (nothing is trained), short, full (%(default)s)",
    )
    group.add_argument(
        "--short",
        type=float,
        default=defaults.SHORT,
        metavar="SHARE",
        help="epochs of short (%(default)s)",
    )
    group.add_argument(
        "--sampler",
        default=defaults.SAMPLER,
        metavar="NAME",
        help="model, or one to compare with: tpe, gp, nsga2, random, a class of Optuna (%(default)s)",
    )
    group.add_argument(
        "--thompson",
        type=float,
        default=defaults.THOMPSON,
        metavar="SHARE",
        help="of the model's trials drawn from what it believes so far (%(default)s)",
    )
    group.add_argument(
        "--rungs", metavar="A,B", help="stop trials early at these percents of their schedule, such as 25,50"
    )
    group.add_argument(
        "--proxy",
        default=defaults.PROXY,
        metavar="NAME",
        help="pruner whose curves the model starts from, or uniform widths (%(default)s)",
    )
    group.add_argument(
        "--interactions", action="store_true", help="the model has products of neighbouring groups"
    )
    group.add_argument(
        "--calibrate",
        type=int,
        default=defaults.CALIBRATE,
        metavar="K",
        help="train K networks in full first, and measure how well each objective ranks them",
    )
    _finals_options(group)
    _crew_options(parser.add_argument_group("workers of a search"))
    return group


def _finals_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--finals",
        type=int,
        default=defaults.FINALS,
        metavar="N",
        help="fresh seeds of each finalist (%(default)s)",
    )
    group.add_argument(
        "--top",
        type=int,
        metavar="K",
        help="so many of the best trials are finalists (0 with the model, 1 with another sampler)",
    )
    group.add_argument(
        "--baselines",
        metavar="A,B,…",
        help="methods whose widths are finalists, NAME or NAME:ALLOCATION (l1_norm:knapsack)",
    )


def _crew_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--jobs", type=int, default=defaults.JOBS, metavar="N", help="trainings at once (%(default)s)"
    )
    group.add_argument(
        "--engine", metavar="NAME", help="inline, local, ray or slurm (inline; local with --jobs)"
    )
    group.add_argument("--address", metavar="ADDRESS", help="of a Ray cluster")
    group.add_argument("--cpus-per-task", type=int, metavar="N", help="CPUs of a training, Ray or SLURM")
    group.add_argument("--gpus-per-task", type=int, metavar="N", help="GPUs of a training, Ray or SLURM")
    group.add_argument(
        "--slurm", action="append", default=[], metavar="KEY=VALUE", help="a parameter of SLURM's jobs"
    )
    group.add_argument(
        "--storage", metavar="URL", help="PostgreSQL that several drivers share ($ARCHSEARCH_STORAGE)"
    )


def search_values(options: argparse.Namespace) -> dict[str, Any]:
    """Return what ``api.search`` is given."""
    engine = {
        "address": options.address,
        "cpus": options.cpus_per_task,
        "gpus": options.gpus_per_task,
        "slurm": named_values(options.slurm, "--slurm") or None,
    }
    quest = ("trials", "objective", "short", "sampler", "thompson", "proxy", "interactions", "rungs")
    more = ("calibrate", "finals", "top", "jobs", "engine", "storage")
    return {
        **{name: getattr(options, name) for name in (*quest, *more)},
        "baselines": None
        if options.baselines is None
        else [name for name in options.baselines.split(",") if name],
        "engine_options": {name: value for name, value in engine.items() if value is not None},
    }
