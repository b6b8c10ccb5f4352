"""The command line: parse, call one function, print. torch is imported inside the commands only."""

from __future__ import annotations

import argparse
import difflib
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from archsearch.errors import ArchsearchError, ResourceError, SpecError, UnknownNameError, UsageError

if TYPE_CHECKING:
    from archsearch.callbacks import Callback
    from archsearch.data import DataSource
    from archsearch.rebuild import Traced
    from archsearch.recipe import Recipe

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
    find.set_defaults(run=_find)
    _model_options(find)
    target = find.add_argument_group(
        "target", "what may stay: a share of the reference (0.5, 50%) or a limit (60M)"
    )
    target.add_argument("--flops", metavar="KEEP", help="multiply-adds that stay (1 FLOP = 1 multiply-add)")
    target.add_argument("--params", metavar="KEEP", help="parameters that stay")
    target.add_argument("--memory", metavar="KEEP", help="bytes of peak activation memory that stay")
    target.add_argument(
        "--preset", metavar="NAME", help="published widths, such as resnet56-a; implies the model"
    )
    method = find.add_argument_group("method")
    method.add_argument("--method", default="l1_norm", metavar="NAME", help="pruner (%(default)s)")
    method.add_argument("--allocation", metavar="NAME", help="local or global (the method's own)")
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
    train.set_defaults(run=_train)
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
    evaluate.set_defaults(run=_evaluate)
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
    show.set_defaults(run=_show)
    show.add_argument(
        "architecture", nargs="?", metavar="ARCH.yaml", help="an architecture file, or give --model"
    )
    _model_options(show)
    show.add_argument("--plot", type=Path, metavar="FILE", help="draw the widths (.png, .svg, .pdf)")
    show.add_argument("--graph", type=Path, metavar="FILE", help="draw the channel graph (.png, .svg, .pdf)")

    names = commands.add_parser("list", help="list models, pruners, data sets, recipes, budgets or presets")
    names.set_defaults(run=_list)
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = os.environ.get("ARCHSEARCH_DEBUG") == "1"
    try:
        parser = build_parser()
        options = parser.parse_args(words)
        if options.version:
            from archsearch.results import environment

            print(f"archsearch {environment()['archsearch']}")
        elif options.command is None:
            parser.print_help()
        else:
            options.words = words
            options.run(options)
        sys.stdout.flush()  # a reader that is gone shows here, not when the interpreter ends
        return 0
    except KeyboardInterrupt:
        return _fail("stopped; the same command goes on from the last checkpoint", 130)
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except Exception as error:
        if debug:
            raise
        known = _known(error)
        if known is not None:
            return _fail(str(known), known.exit_code)
        return _fail(
            f"a bug of archsearch: {type(error).__name__}: {error}; ARCHSEARCH_DEBUG=1 shows where", 1
        )


def _known(error: Exception) -> ArchsearchError | None:
    """Return the error in our terms, if it is one of ours or of too little memory."""
    if isinstance(error, ArchsearchError):
        return error
    text = str(error).splitlines()[0] if str(error) else ""
    if isinstance(error, MemoryError) or "out of memory" in text.lower() or "can't allocate memory" in text:
        return ResourceError(f"out of memory: {text or 'smaller --batch-size needs less'}")
    return None


def _fail(message: str, code: int) -> int:
    print(f"archsearch: error: {' '.join(message.splitlines())}", file=sys.stderr)
    return code


def _find(options: argparse.Namespace) -> None:
    from archsearch.api import find
    from archsearch.report import comparison

    data = options.data or (None if options.budget == "none" else "digits")
    out = options.out or Path("runs") / _run_name(options, data)
    found = find(
        options.model,
        flops=options.flops,
        params=options.params,
        memory=options.memory,
        preset=options.preset,
        method=options.method,
        allocation=options.allocation,
        space=_space(options),
        data=data,
        data_options=_data_arguments(options),
        weights=options.weights,
        budget=options.budget,
        budget_cap=options.budget_cap,
        published_cost=options.published_cost,
        finetune=options.finetune,
        recipe=options.recipe,
        recipe_changes=_recipe_changes(options),
        seeds=options.seeds,
        seed=options.seed,
        device=options.device,
        input_shape=_input_shape(options),
        classes=options.classes,
        arguments=_pairs(options.argument, "--argument"),
        trust_code=options.trust_code,
        out=out,
        store=options.store,
        conditions={"command": _command(options.words)},
        say=_say,
        callbacks=_callbacks(options),
    )
    _print(comparison(found.record))
    for path in found.files:
        _print(f"wrote {path}")


def _train(options: argparse.Namespace) -> None:
    from archsearch.downstream import train_architecture
    from archsearch.report import comparison

    data = _load_data(options)
    out = options.out or options.architecture.with_suffix("")
    record = train_architecture(
        options.architecture,
        data,
        _recipe(options, data.name),
        budget=options.budget,
        published_cost=options.published_cost,
        weights=options.weights,
        seeds=options.seeds,
        seed=options.seed,
        device=options.device,
        trust_code=options.trust_code,
        out=out,
        store=options.store,
        say=_say,
        callbacks=_callbacks(options),
    )
    _print(comparison(record))
    for name in ("weights.safetensors", "results.json", "results.md"):
        _print(f"wrote {out / name}")


def _evaluate(options: argparse.Namespace) -> None:
    from archsearch.downstream import evaluate_architecture

    data = _load_data(options)
    measured = evaluate_architecture(
        options.architecture, options.weights, data, device=options.device, trust_code=options.trust_code
    )
    _print(
        f"{data.name}: {measured.accuracy:.2f} % of {measured.images:,} test images, loss {measured.loss:.4f}"
    )


def _show(options: argparse.Namespace) -> None:
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
        traced, widths = describe_architecture(Path(options.architecture), options.trust_code, _print)
    else:
        traced, widths = describe_model(_trace(options), _print)
    if options.plot is not None:
        plot_widths(traced, widths, options.plot, options.architecture or options.model)
        _print(f"wrote {options.plot}")
    if options.graph is not None:
        draw_graph(traced, options.graph)
        _print(f"wrote {options.graph}")


def _list(options: argparse.Namespace) -> None:
    from archsearch.catalogue import CATALOGUES

    for line in CATALOGUES[options.kind](options.pattern):
        print(line)


def _trace(options: argparse.Namespace) -> Traced:
    from archsearch.api import shape_and_arguments
    from archsearch.models import resolve
    from archsearch.rebuild import trace_source

    source = resolve(options.model, trust_code=options.trust_code)
    arguments = _pairs(options.argument, "--argument")
    shape, words = shape_and_arguments(source, None, _input_shape(options), options.classes, arguments)
    return trace_source(source, words, shape)


def _recipe(options: argparse.Namespace, data: str) -> Recipe:
    from archsearch.api import default_recipe
    from archsearch.recipe import RECIPES

    return RECIPES[options.recipe or default_recipe(data)].with_(**_recipe_changes(options))


def _recipe_changes(options: argparse.Namespace) -> dict[str, Any]:
    named = {"epochs": options.epochs, "lr": options.lr, "batch_size": options.batch_size}
    fields = {name: value for name, value in named.items() if value is not None}
    return {**fields, **_split_pairs(options.set, "--set")}


def _space(options: argparse.Namespace) -> Any:
    from dataclasses import replace

    from archsearch.space import SearchSpace

    space = SearchSpace.read(options.space) if options.space else SearchSpace()
    given = {name: getattr(options, name) for name in ("round_to", "min_width", "min_keep")}
    bounds = replace(space.bounds, **{name: value for name, value in given.items() if value is not None})
    return replace(space, bounds=bounds, ignore=(*space.ignore, *(options.ignore or ())))


def _data_arguments(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "data_dir": options.data_dir,
        "download": options.download,
        "image_size": options.image_size,
        "workers": options.workers,
    }


def _load_data(options: argparse.Namespace) -> DataSource:
    from archsearch.data import load_data

    data = load_data(options.data or "digits", **_data_arguments(options))
    _say(data.announcement)
    return data


def _input_shape(options: argparse.Namespace) -> tuple[int, ...] | None:
    if options.input_shape is None:
        return None
    try:
        shape = tuple(int(part) for part in options.input_shape.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise UsageError(f"--input-shape {options.input_shape}: give whole numbers such as 3,224,224")
    return shape


def _pairs(pairs: Sequence[str], option: str) -> dict[str, Any]:
    """Return ``NAME=VALUE`` words with values read as in an architecture file."""
    from archsearch.bounded_yaml import parse

    found = {}
    for name, text in _split_pairs(pairs, option).items():
        try:
            found[name] = parse(f"value: {text}", option).data["value"]
        except SpecError:
            raise UsageError(f"{option} {name}={text}: give a plain value such as 3, true or B") from None
    return found


def _split_pairs(pairs: Sequence[str], option: str) -> dict[str, str]:
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UsageError(f"{option} {pair}: give NAME=VALUE")
        found[name.replace("-", "_")] = value
    return found


def _run_name(options: argparse.Namespace, data: str | None) -> str:
    """Return a directory name that says what the run is."""
    target = options.preset or "-".join(
        f"{name}-{getattr(options, name)}" for name in ("flops", "params", "memory") if getattr(options, name)
    )
    parts = [options.model or "", data or "", options.method, target]
    return "-".join("".join(c if c.isalnum() or c in "._" else "-" for c in part) for part in parts if part)


def _command(words: Sequence[str]) -> str:
    """Return the command as it can be typed again; a very long one is cut to what a file may hold."""
    command = shlex.join(["archsearch", *words])
    return command if len(command) <= 1024 else f"{command[:1020]} …"


def _callbacks(options: argparse.Namespace) -> Callable[[str, Path], Sequence[Callback]]:
    def make(label: str, directory: Path) -> Sequence[Callback]:
        from archsearch.callbacks import TensorBoard
        from archsearch.progress import ProgressBar

        bar: Callback = ProgressBar(label)
        return [bar, TensorBoard(options.tensorboard / directory.name)] if options.tensorboard else [bar]

    return make


def _say(line: str) -> None:
    """Tell the user what is going on; results go to standard output."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


def _print(what: Any) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    if isinstance(what, str):
        print(what)
        return
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    with console.capture() as text:  # rich would end the process itself where the reader is gone
        console.print(what)
    print("\n".join(line.rstrip() for line in text.get().splitlines()))


if __name__ == "__main__":
    sys.exit(main())
