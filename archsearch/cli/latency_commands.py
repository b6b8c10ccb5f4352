"""The commands ``bench`` and ``selftest``: latency as it is measured."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from archsearch.cli.output import say, show_result
from archsearch.cli.values import command_line
from archsearch.errors import ResourceError


def add_commands(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the parsers of both."""
    bench = commands.add_parser(
        "bench",
        help="measure the latency of architectures side by side with their reference",
        description="Run several architectures of one reference and the reference in turn, and say how long "
        "each takes,\nhow many inputs a second that is and how much memory; weights are fresh.",
    )
    bench.add_argument("architectures", nargs="+", type=Path, metavar="ARCH.yaml")
    runtime_options(bench)
    bench.add_argument("--plot", type=Path, metavar="FILE", help="draw the latencies (.png, .svg, .pdf)")
    bench.add_argument("--out", type=Path, metavar="FILE", help="every block that was timed (.json)")
    bench.add_argument(
        "--trust-code", action="store_true", help="import the code that the files' model names"
    )

    selftest = commands.add_parser(
        "selftest",
        help="check that this machine can be timed",
        description="Check the clock, that twice the work takes twice as long, that the same work takes the "
        "same time,\nand that other timers agree.",
    )
    _device_option(selftest)


def runtime_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add what says where and how networks are run and timed; return the group for more of it."""
    group = parser.add_argument_group("latency")
    group.add_argument(
        "--runtime",
        default="torch",
        metavar="NAME",
        help="torch, compile, cudagraph, onnxruntime, openvino or tensorrt (%(default)s)",
    )
    _device_option(group)
    group.add_argument("--batch", type=int, default=1, metavar="B", help="inputs of a call (%(default)s)")
    group.add_argument(
        "--dtype", default="float32", metavar="NAME", help="float32, bfloat16 or float16 (%(default)s)"
    )
    group.add_argument(
        "--layout",
        default="channels_last",
        choices=("channels_last", "contiguous"),
        metavar="NAME",
        help="of tensors in memory, where torch runs: channels_last or contiguous (%(default)s)",
    )
    group.add_argument("--threads", type=int, default=1, metavar="N", help="threads of the CPU (%(default)s)")
    group.add_argument(
        "--blocks", type=int, default=10, metavar="N", help="timed blocks of each network (%(default)s)"
    )
    return group


def run_bench(options: argparse.Namespace) -> None:
    """Measure, show the table and what is to be said about it, and write what was asked for."""
    from archsearch import files
    from archsearch.latency.bench import bench, draw
    from archsearch.latency.measure import Protocol
    from archsearch.pictures import check_picture
    from archsearch.results import environment
    from archsearch.training.evaluation import resolve_device

    check_picture(options.plot)
    if options.out is not None:
        files.probe(options.out.parent, 0)
    result = bench(
        options.architectures,
        runtime=options.runtime,
        device=str(resolve_device(options.device)),
        dtype=options.dtype,
        batch=options.batch,
        channels_last=options.layout == "channels_last",
        protocol=Protocol(blocks=options.blocks, threads=options.threads),
        trust_code=options.trust_code,
        conditions={
            "command": command_line(options.words),
            "versions": environment(),
            "date": time.strftime("%Y-%m-%d"),
        },
        say=say,
    )
    _show_table(result.table())
    if not all(entry.memory_measured for entry in result.entries):
        show_result("memory: computed from the shapes, without what the runtime itself needs")
    for entry in result.entries:
        if entry.measurement.words:
            show_result(f"{entry.name}: {entry.measurement.words}")
    if options.plot is not None:
        draw(result, options.plot)
        show_result(f"wrote {options.plot}")
    if options.out is not None:
        files.write_json(options.out, result.as_dict())
        show_result(f"wrote {options.out}")


def run_selftest(options: argparse.Namespace) -> None:
    """Show each finding; fail if one is bad.

    Raises:
        ResourceError: If this machine cannot be timed well now.
    """
    from archsearch.latency.selftest import selftest
    from archsearch.training.evaluation import resolve_device

    bad = []
    for check in selftest(str(resolve_device(options.device))):
        show_result(f"{'ok ' if check.ok else 'BAD'} {check.name}: {check.words}")
        if not check.ok:
            bad.append(check.name)
    if bad:
        raise ResourceError(
            f"latencies measured here and now cannot be trusted ({', '.join(bad)}): stop what else runs on "
            "this machine and try again"
        )


COMMANDS: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "bench": run_bench,
    "selftest": run_selftest,
}


def _device_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1 or auto (%(default)s)"
    )


def _show_table(rows: list[list[str]]) -> None:
    from rich.table import Table

    header, *body = rows
    table = Table()
    for number, column in enumerate(header):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    for row in body:
        table.add_row(*row)
    show_result(table)
