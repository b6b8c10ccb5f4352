"""The commands ``dsd``, ``compress`` and ``decompress``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from archsearch.cli.options import data_options, model_options, training_options
from archsearch.cli.output import say, show_result
from archsearch.cli.studies import conditions, reference, run_directory, trainer
from archsearch.cli.values import chosen_recipe, opened_data
from archsearch.errors import UsageError


def add_commands(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the parsers of all three."""
    dsd = commands.add_parser(
        "dsd",
        help="train dense, sparse and dense again; compare with dense training as long",
        description="Train the network, prune every layer to the same share and train what stays, let the "
        "dropped\nweights come back from zero at a tenth of the learning rate; compare with dense training "
        "of the same length.",
    )
    model_options(dsd)
    phases = dsd.add_argument_group("phases")
    phases.add_argument(
        "--keep",
        type=float,
        default=0.7,
        metavar="R",
        help="share of each layer's weights that stays in the sparse phase (%(default)s)",
    )
    for phase in ("sparse", "redense"):
        phases.add_argument(
            f"--{phase}-epochs", type=int, metavar="N", help=f"epochs of the {phase} phase (the recipe's)"
        )
    data_options(dsd)
    training_options(dsd, published_cost=False)
    dsd.add_argument("--out", type=Path, metavar="DIR", help="results (runs/dsd-MODEL-DATA-KEEP)")

    compress = commands.add_parser(
        "compress",
        help="prune, share and code the weights of a trained architecture: Deep Compression",
        description="Prune the weights of a trained architecture, let them share values, train these, and "
        "code\nthem into one small file that decodes to the very weights; report accuracy and size after "
        "each stage.",
    )
    compress.add_argument("architecture", type=Path, metavar="ARCH.yaml")
    compress.add_argument("--weights", type=Path, required=True, metavar="FILE", help="its trained weights")
    _coding_options(compress.add_argument_group("coding"))
    data_options(compress)
    training = training_options(compress, seeds=False, published_cost=False)
    training.add_argument(
        "--budget",
        default="finetune",
        metavar="NAME",
        help="training after each pruning and of the shared values: finetune, none (%(default)s)",
    )
    training.add_argument(
        "--tune-epochs", type=int, metavar="N", help="epochs of each of these (the budget's)"
    )
    training.add_argument(
        "--centroid-lr", type=float, metavar="X", help="rate of the shared values (a tenth of the budget's)"
    )
    compress.add_argument(
        "--trust-code", action="store_true", help="import the code that the file's model names"
    )
    compress.add_argument("--out", type=Path, metavar="DIR", help="weights.dc and results (ARCH-compressed)")

    decompress = commands.add_parser("decompress", help="turn a .dc file into weights that evaluate takes")
    decompress.add_argument("file", type=Path, metavar="FILE.dc")
    decompress.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the weights (.safetensors)"
    )


def run_dsd(options: argparse.Namespace) -> None:
    """Train in three phases, compare, and name the files written."""
    from archsearch.dsd import Phases, dsd
    from archsearch.report import comparison

    data = opened_data(options)
    recipe = chosen_recipe(options, data.name)
    phases = Phases(
        keep=options.keep,
        recipe=recipe,
        sparse_epochs=options.sparse_epochs,
        redense_epochs=options.redense_epochs,
        seeds=options.seeds,
        seed=options.seed,
    )
    traced, _ = reference(options, data)
    result = dsd(
        traced,
        phases,
        trainer(options, data),
        out=options.out or run_directory(f"dsd-{options.model}-{data.name}-{options.keep:g}"),
        conditions=conditions(options, traced.name, data, recipe),
        say=say,
    )
    show_result(comparison(result.record))
    for path in result.files:
        show_result(f"wrote {path}")


def run_compress(options: argparse.Namespace) -> None:
    """Compress the weights of an architecture, and show what each stage gives."""
    from archsearch.architecture import Architecture
    from archsearch.compression.compress import compress
    from archsearch.rebuild import load_weights, trace_architecture
    from archsearch.trainer import check_classes

    architecture = Architecture.read(options.architecture)
    data = None if options.budget == "none" and options.data is None else opened_data(options)
    recipe = chosen_recipe(options, data.name if data else "digits")
    coding = _coding(options, recipe)
    path = options.architecture
    if data is not None and tuple(architecture.input_shape) != tuple(data.input_shape):
        raise UsageError(
            f"{path} is for inputs of {tuple(architecture.input_shape)}, but {data.name} has images of "
            f"{tuple(data.input_shape)}: give --image-size"
        )
    traced = trace_architecture(architecture, trust_code=options.trust_code, where=str(path))
    if data is not None:
        check_classes(traced, data)
    model, _ = traced.fresh({name: group.width for name, group in architecture.widths.items()})
    load_weights(model, options.weights)
    result = compress(
        model,
        coding,
        trainer(options, data) if data else None,
        out=options.out or path.with_name(f"{path.stem}-compressed"),
        architecture=architecture.key,
        conditions=conditions(options, architecture.model, data, recipe),
        say=say,
    )
    _show_tables(result.rows(), result.layer_rows())
    for written in result.files:
        show_result(f"wrote {written}")


def run_decompress(options: argparse.Namespace) -> None:
    """Decode a file into weights."""
    from archsearch.compression.container import read_compressed
    from archsearch.tensor_files import write_tensors

    if options.out.suffix != ".safetensors":
        raise UsageError(f"--out {options.out}: weights are written as .safetensors")
    content = read_compressed(options.file)
    write_tensors(options.out, content.state_dict())
    belongs = f" of the architecture {content.architecture}" if content.architecture else ""
    show_result(f"wrote {options.out}: the weights{belongs}")


COMMANDS: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "dsd": run_dsd,
    "compress": run_compress,
    "decompress": run_decompress,
}


def _coding_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--keep", type=float, metavar="R", help="share of every layer's weights that survives")
    group.add_argument(
        "--conv-keep", type=float, metavar="R", help="the same of convolutions (--keep, or 0.35)"
    )
    group.add_argument(
        "--linear-keep",
        type=float,
        metavar="R",
        help="the same of linear and recurrent layers (--keep, or 0.1)",
    )
    group.add_argument(
        "--layer-keep",
        action="append",
        default=[],
        metavar="NAME=R",
        help="the same of one parameter, such as fc3.weight=0.26",
    )
    group.add_argument("--steps", type=int, default=1, metavar="N", help="prune in N steps (%(default)s)")
    for kind, bits in (("conv", 8), ("linear", 5)):
        group.add_argument(
            f"--{kind}-bits",
            type=int,
            default=bits,
            metavar="N",
            help=f"bits of a shared weight of {kind} layers (%(default)s)",
        )
        group.add_argument(
            f"--{kind}-index-bits",
            type=int,
            default=bits,
            metavar="N",
            help=f"bits of a relative index in {kind} layers (%(default)s)",
        )


def _coding(options: argparse.Namespace, recipe: Any) -> Any:
    from archsearch.compression.compress import Coding

    shares = {
        name: value
        for name, own in (("conv_keep", options.conv_keep), ("linear_keep", options.linear_keep))
        if (value := options.keep if own is None else own) is not None
    }
    return Coding(
        **shares,
        layer_keep=_layer_shares(options.layer_keep),
        steps=options.steps,
        conv_bits=options.conv_bits,
        linear_bits=options.linear_bits,
        conv_index_bits=options.conv_index_bits,
        linear_index_bits=options.linear_index_bits,
        recipe=recipe,
        budget=options.budget,
        tune_epochs=options.tune_epochs,
        centroid_lr=options.centroid_lr,
        seed=options.seed,
    )


def _layer_shares(pairs: list[str]) -> dict[str, float]:
    shares = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        try:
            shares[name] = float(text)
        except ValueError:
            raise UsageError(f"--layer-keep {pair}: give NAME=R, such as fc3.weight=0.26") from None
    return shares


def _show_tables(*tables: Iterable[tuple[str, ...]]) -> None:
    from rich.table import Table

    for rows in tables:
        header, *body = rows
        table = Table()
        for number, column in enumerate(header):
            table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
        for row in body:
            table.add_row(*row)
        show_result(table)
