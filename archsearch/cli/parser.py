"""The commands and their options."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path
from typing import Any, NoReturn

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
from archsearch.cli.options import (
    data_options,
    model_options,
    training_options,
)
from archsearch.errors import UnknownNameError, UsageError

EPILOG = """exit codes: 0 done; 2 a wrong option; 3 a wrong file; 4 damaged weights or data; 5 a directory in
use; 6 a target out of reach; 7 diverged; 8 no space or memory; 75 stopped by a signal and 130 by Ctrl-C,
the same command goes on; 1 a bug of ours"""

KINDS = (
    "models",
    "pruners",
    "allocations",
    "data",
    "recipes",
    "budgets",
    "presets",
    "criteria",
    "samplers",
    "objectives",
    "engines",
)
"""What ``list`` lists."""


class _Parser(argparse.ArgumentParser):
    """Parse without abbreviations; an unknown option gets one line with the nearest right one."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise UnknownNameError(str(action.metavar or action.dest).lower(), value, action.choices)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = super().parse_known_args(args, namespace)
        for word in unknown:
            near = difflib.get_close_matches(word.partition("=")[0], self._option_string_actions, n=1)
            self.error(f"unknown option {word}{f': did you mean {near[0]}?' if near else ''}")
        return parsed, unknown


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = _Parser(
        prog="archsearch",
        description="Find a smaller architecture of any torch network, rebuild it and train it from scratch.",
        epilog=EPILOG,
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)

    find_commands.add_commands(commands)
    search_commands.add_commands(commands)
    dashboard_commands.add_commands(commands)

    train = commands.add_parser("train", help="train the network of an architecture file")
    train.add_argument("architecture", type=Path, metavar="ARCH.yaml")
    data_options(train)
    training = training_options(train)
    training.add_argument(
        "--budget", default="scratch-e", metavar="NAME", help="scratch-e, scratch-b, finetune"
    )
    training.add_argument(
        "--weights", type=Path, metavar="FILE", help="weights of this architecture to start from"
    )
    train.add_argument(
        "--trust-code", action="store_true", help="import the code that the file's model names"
    )
    train.add_argument("--out", type=Path, metavar="DIR", help="results (beside the file)")

    evaluate = commands.add_parser("evaluate", help="measure a trained architecture on the test set")
    evaluate.add_argument("architecture", type=Path, metavar="ARCH.yaml")
    evaluate.add_argument("--weights", type=Path, required=True, metavar="FILE", help="its weights")
    evaluate.add_argument(
        "--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1 or auto (%(default)s)"
    )
    evaluate.add_argument(
        "--trust-code", action="store_true", help="import the code that the file's model names"
    )
    data_options(evaluate)

    show = commands.add_parser("show", help="show an architecture, or the channel groups of a model")
    show.add_argument(
        "architecture", nargs="?", metavar="ARCH.yaml", help="an architecture file, or give --model"
    )
    model_options(show)
    show.add_argument("--plot", type=Path, metavar="FILE", help="draw the widths (.png, .svg, .pdf)")
    show.add_argument("--graph", type=Path, metavar="FILE", help="draw the channel graph (.png, .svg, .pdf)")

    sparsity_commands.add_commands(commands)
    guide_commands.add_commands(commands)
    compression_commands.add_commands(commands)
    latency_commands.add_commands(commands)
    profile_commands.add_commands(commands)
    names = commands.add_parser("list", help="list models, pruners, data sets, recipes, budgets or presets")
    names.add_argument(
        "kind",
        choices=KINDS,
        metavar="KIND",
        help=f"{', '.join(KINDS[:-1])} or {KINDS[-1]}",
    )
    names.add_argument("pattern", nargs="?", default="*", help="such as 'resnet*' or 'torchvision/*'")
    return parser
