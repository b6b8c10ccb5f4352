"""The commands and their options."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path
from typing import Any, NoReturn

from archsearch.errors import UnknownNameError, UsageError

EPILOG = """exit codes: 0 done; 2 a wrong option; 3 a wrong file; 4 damaged weights or data; 5 a directory in
use; 6 a target out of reach; 7 diverged; 8 no space or memory; 75 stopped by a signal and 130 by Ctrl-C,
the same command goes on; 1 a bug of ours"""


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

    find = commands.add_parser(
        "find",
        help="prune a network, keep the widths, train them from scratch, compare",
        description="Train (or load) the reference, prune it to a target, keep only the widths, rebuild a "
        "fresh network,\ntrain it from scratch, and compare it with fine-tuning, uniform widths and the "
        "reference.",
    )
    _model_options(find)
    target = find.add_argument_group(
        "target", "what may stay: a share of the reference (0.5, 50%) or a limit (60M)"
    )
    target.add_argument("--flops", metavar="KEEP", help="multiply-adds that stay (1 FLOP = 1 multiply-add)")
    target.add_argument("--params", metavar="KEEP", help="parameters that stay")
    target.add_argument("--memory", metavar="KEEP", help="bytes of peak activation memory that stay")
    target.add_argument("--channels", metavar="KEEP", help="channels of all groups together that stay")
    target.add_argument(
        "--preset", metavar="NAME", help="published widths, such as resnet56-a; implies the model"
    )
    method = find.add_argument_group("method")
    method.add_argument("--method", default="l1_norm", metavar="NAME", help="pruner (%(default)s)")
    method.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="a hyper-parameter of the method"
    )
    method.add_argument("--allocation", metavar="NAME", help="local or global (the method's own)")
    method.add_argument(
        "--steps", type=int, default=1, metavar="N", help="prune in N steps with recovery (%(default)s)"
    )
    method.add_argument(
        "--recover", type=int, default=1, metavar="N", help="epochs of each recovery (%(default)s)"
    )
    method.add_argument(
        "--recalibrate", action="store_true", help="fresh batch-norm statistics after each cut"
    )
    _space_options(method)
    _data_options(find)
    training = _training_options(find)
    training.add_argument(
        "--budget",
        default="scratch-b",
        metavar="NAME",
        help="training of what was found: scratch-e (as many epochs), scratch-b (as many FLOPs), finetune, "
        "none (%(default)s)",
    )
    training.add_argument(
        "--budget-cap", type=float, metavar="X", help="most epochs, in multiples of the recipe's"
    )
    training.add_argument(
        "--finetune", default="finetune", metavar="NAME",
        help="the fine-tuned arm: finetune (lr .01) or finetune-published (lr .001 constant)",
    )  # fmt: skip
    training.add_argument("--weights", metavar="FILE", help="the reference's weights; torchvision: DEFAULT")
    find.add_argument("--out", type=Path, metavar="DIR", help="results (runs/MODEL-DATA-METHOD-TARGET)")

    train = commands.add_parser("train", help="train the network of an architecture file")
    train.add_argument("architecture", type=Path, metavar="ARCH.yaml")
    _data_options(train)
    training = _training_options(train)
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
    _data_options(evaluate)

    show = commands.add_parser("show", help="show an architecture, or the channel groups of a model")
    show.add_argument(
        "architecture", nargs="?", metavar="ARCH.yaml", help="an architecture file, or give --model"
    )
    _model_options(show)
    show.add_argument("--plot", type=Path, metavar="FILE", help="draw the widths (.png, .svg, .pdf)")
    show.add_argument("--graph", type=Path, metavar="FILE", help="draw the channel graph (.png, .svg, .pdf)")

    names = commands.add_parser("list", help="list models, pruners, data sets, recipes, budgets or presets")
    names.add_argument(
        "kind",
        choices=("models", "pruners", "allocations", "data", "recipes", "budgets", "presets"),
        metavar="KIND",
        help="models, pruners, allocations, data, recipes, budgets or presets",
    )
    names.add_argument("pattern", nargs="?", default="*", help="such as 'resnet*' or 'torchvision/*'")
    return parser


def _model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", metavar="NAME",
        help="resnet56, torchvision/NAME, timm/NAME, package.module:factory or path/file.py:factory",
    )  # fmt: skip
    group.add_argument("--trust-code", action="store_true", help="import the code that --model names")
    group.add_argument("--input-shape", metavar="C,H,W", help="one input (the data's, or the model's own)")
    group.add_argument("--classes", type=int, metavar="N", help="outputs (the data's, or the model's own)")
    group.add_argument(
        "--argument",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="argument of the model's factory",
    )


def _space_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--space", type=Path, metavar="FILE", help="bounds by group, such as search_spaces/*.yaml"
    )
    group.add_argument("--ignore", action="append", metavar="GLOB", help="layers whose channels all stay")
    group.add_argument("--round-to", type=int, metavar="N", help="channels are multiples of N")
    group.add_argument("--min-width", type=int, metavar="N", help="fewest channels of a layer (1)")
    group.add_argument(
        "--min-keep", type=float, metavar="R", help="smallest share of a group that stays (0.1)"
    )


def _data_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", metavar="NAME", help="digits (embedded), fashion-mnist, mnist, cifar10, … (digits)"
    )
    group.add_argument("--data-dir", metavar="DIR", help="where its files are")
    group.add_argument("--download", action="store_true", help="fetch missing files into --data-dir")
    group.add_argument("--image-size", type=int, metavar="N", help="bring images to N x N pixels")
    group.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read image files")


def _training_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("training")
    group.add_argument(
        "--recipe", metavar="NAME", help="cifar, imagenet, modern or quick (what suits the data)"
    )
    group.add_argument("--epochs", type=int, metavar="N", help="epochs of the reference")
    group.add_argument("--lr", type=float, metavar="X", help="learning rate")
    group.add_argument(
        "--batch-size", type=int, metavar="N", help="images in a step, of all processes together"
    )
    group.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="another field of the recipe"
    )
    group.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="trainings of each network (%(default)s)"
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="the first seed (%(default)s)")
    group.add_argument(
        "--published-cost", action="store_true", help="Scratch-B by the FLOPs of Liu et al., not MACs"
    )
    group.add_argument(
        "--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1 or auto (%(default)s)"
    )
    group.add_argument("--tensorboard", type=Path, metavar="DIR", help="write curves for TensorBoard")
    group.add_argument(
        "--store", type=Path, default=Path("runs"), metavar="DIR", help="all trainings (%(default)s)"
    )
    return group
