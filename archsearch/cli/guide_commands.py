"""The command ``guide``: its options, and what it does with them."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from archsearch.cli.options import model_options, space_options, target_options
from archsearch.cli.output import say, show_result
from archsearch.cli.values import command_line, search_space, traced_model


def add_commands(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command to those of the parser."""
    guide = commands.add_parser(
        "guide",
        help="give a network the shares that architecture files keep in each stage, on average",
        description="Average the channels that architecture files keep in each stage of their networks, over "
        "seeds and networks,\nand write an architecture with these shares for the same network or another "
        "(Liu et al., ICLR 2019, section 5).",
    )
    guide.add_argument("architectures", nargs="+", type=Path, metavar="ARCH.yaml", help="what was found")
    guide.add_argument("--out", type=Path, required=True, metavar="FILE", help="the new architecture file")
    guide.add_argument(
        "--stage-by",
        default="resolution",
        metavar="RULE",
        help="which layers are a stage: resolution, name or layer (%(default)s)",
    )
    model_options(guide, "--to")
    target_options(guide)
    space_options(guide.add_argument_group("widths"))


def run_guide(options: argparse.Namespace) -> None:
    """Write the guided architecture, and say what it keeps."""
    from archsearch import files
    from archsearch.api import summary
    from archsearch.architecture import Architecture
    from archsearch.guide import guide
    from archsearch.rebuild import trace_architecture
    from archsearch.results import environment
    from archsearch.targets import Resource, Target

    sources = [Architecture.read(path) for path in options.architectures]
    files.probe(options.out.parent, 0)
    if options.model is None:
        traced = trace_architecture(
            sources[0], trust_code=options.trust_code, where=str(options.architectures[0])
        )
    else:
        traced = traced_model(options)
    say(summary(traced))
    asked: dict[Resource, str | None] = {
        "flops": options.flops,
        "params": options.params,
        "memory": options.memory,
        "channels": options.channels,
    }
    architecture = guide(
        sources,
        traced,
        [Target.parse(resource, text) for resource, text in asked.items() if text is not None],
        stage_by=options.stage_by,
        space=search_space(options),
        trust_code=options.trust_code,
        provenance={
            "command": command_line(options.words),
            "versions": environment(),
            "date": time.strftime("%Y-%m-%d"),
        },
        say=show_result,
    )
    architecture.write(options.out)
    macs, params = architecture.cost.macs, architecture.cost.params
    if macs is not None and params is not None:
        show_result(
            f"guided: keeps {macs.keep:.4f} of the MACs ({macs.value:,}) and {params.keep:.4f} of the "
            f"parameters ({params.value:,})"
        )
    show_result(f"wrote {options.out}")


COMMANDS: Mapping[str, Callable[[argparse.Namespace], None]] = {"guide": run_guide}
