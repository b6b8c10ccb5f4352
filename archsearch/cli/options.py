"""Options that several commands have."""

from __future__ import annotations

import argparse
from pathlib import Path


def model_options(parser: argparse.ArgumentParser, option: str = "--model") -> None:
    """Add what names a model, by ``option``, and its input."""
    group = parser.add_argument_group("model")
    group.add_argument(
        option, dest="model", metavar="NAME",
        help="resnet56, torchvision/NAME, timm/NAME, package.module:factory or path/file.py:factory",
    )  # fmt: skip
    group.add_argument("--trust-code", action="store_true", help=f"import the code that {option} names")
    group.add_argument("--input-shape", metavar="C,H,W", help="one input (the data's, or the model's own)")
    group.add_argument("--classes", type=int, metavar="N", help="outputs (the data's, or the model's own)")
    group.add_argument(
        "--argument",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="argument of the model's factory",
    )
    group.add_argument(
        "--gather", action="store_true", help="norms of a shared stream select what they read; it stays"
    )
    group.add_argument(
        "--whole-groups", action="store_true", help="whole groups of convolutions go (ResNeXt, RegNet)"
    )


def target_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add what says how small a network must become; return the group for more of it."""
    group = parser.add_argument_group(
        "target", "what may stay: a share of the reference (0.5, 50%) or a limit (60M)"
    )
    group.add_argument("--flops", metavar="KEEP", help="multiply-adds that stay (1 FLOP = 1 multiply-add)")
    group.add_argument("--params", metavar="KEEP", help="parameters that stay")
    group.add_argument("--memory", metavar="KEEP", help="bytes of peak activation memory that stay")
    group.add_argument("--channels", metavar="KEEP", help="channels of all groups together that stay")
    return group


def latency_options(group: argparse._ArgumentGroup) -> None:
    """Add what says how fast a network must become, and on which device."""
    group.add_argument(
        "--latency", metavar="KEEP", help="latency that stays, 0.6 or 1.2ms; with --table or --runtime"
    )
    group.add_argument("--table", type=Path, metavar="FILE", help="what `archsearch profile` made")
    group.add_argument(
        "--other-device", action="store_true", help="take the table of another device; measure nothing"
    )
    group.add_argument(
        "--runtime", metavar="NAME", help="in place of a table: measure one here with torch, onnxruntime, …"
    )
    group.add_argument("--batch", type=int, metavar="B", help="with --runtime: inputs of a call (1)")
    group.add_argument(
        "--dtype", metavar="NAME", help="with --runtime: float32, bfloat16 or float16 (float32)"
    )
    group.add_argument("--threads", type=int, metavar="N", help="with --runtime: threads of the CPU (1)")


def space_options(group: argparse._ArgumentGroup) -> None:
    """Add what says which widths are allowed."""
    group.add_argument(
        "--space", type=Path, metavar="FILE", help="bounds by group, such as search_spaces/*.yaml"
    )
    group.add_argument("--ignore", action="append", metavar="GLOB", help="layers whose channels all stay")
    group.add_argument("--round-to", type=int, metavar="N", help="channels are multiples of N")
    group.add_argument("--min-width", type=int, metavar="N", help="fewest channels of a layer (1)")
    group.add_argument(
        "--min-keep", type=float, metavar="R", help="smallest share of a group that stays (0.1)"
    )
    group.add_argument(
        "--drop-branches", action="store_true", help="whole residual branches may go, down to the shortcut"
    )


def data_options(parser: argparse.ArgumentParser) -> None:
    """Add what names a data set."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", metavar="NAME", help="digits (embedded), fashion-mnist, mnist, cifar10, … (digits)"
    )
    group.add_argument("--data-dir", metavar="DIR", help="where its files are")
    group.add_argument("--download", action="store_true", help="fetch missing files into --data-dir")
    group.add_argument("--image-size", type=int, metavar="N", help="bring images to N x N pixels")
    group.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read image files")
    group.add_argument(
        "--validation-share",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="of the training images that are held out (%(default)s)",
    )
    group.add_argument(
        "--train-share",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="of each class's training images that are trained on (%(default)s)",
    )


def training_options(
    parser: argparse.ArgumentParser, *, seeds: bool = True, published_cost: bool = True
) -> argparse._ArgumentGroup:
    """Add what says how to train; return the group for more of it.

    Args:
        parser: Of the command.
        seeds: Whether it trains networks several times.
        published_cost: Whether it has Scratch-B.
    """
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
    if seeds:
        group.add_argument(
            "--seeds", type=int, default=1, metavar="N", help="trainings of each network (%(default)s)"
        )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="the first seed (%(default)s)")
    if published_cost:
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
