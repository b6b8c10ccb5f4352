"""The command ``profile``: its options, and what it does with them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import isnan
from pathlib import Path
from typing import Any

from archsearch.cli.latency_commands import runtime_options
from archsearch.cli.options import model_options
from archsearch.cli.output import say, show_result
from archsearch.cli.values import traced_model
from archsearch.errors import InfeasibleError, UsageError


def add_commands(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command to those of the parser."""
    profile = commands.add_parser(
        "profile",
        help="measure a table that predicts a network's latency on this device",
        description="Find the channel quantum of this device, measure a table of layers and a few whole "
        "networks,\nand say how well their latency is predicted. The same command goes on where it stopped.",
    )
    model_options(profile)
    runtime_options(profile)
    profile.add_argument(
        "--drop-branches",
        action="store_true",
        help="measure networks that lack residual branches as well, for a search that may drop them",
    )
    effort = profile.add_argument_group("effort")
    effort.add_argument("--max-seconds", type=float, metavar="S", help="as many cells as there is time for")
    effort.add_argument(
        "--max-cells", type=int, default=300, metavar="N", help="layers to measure (%(default)s)"
    )
    effort.add_argument(
        "--calibration", type=int, default=20, metavar="N", help="networks to calibrate with (%(default)s)"
    )
    effort.add_argument(
        "--held-out", type=int, default=20, metavar="N", help="networks to test with (%(default)s)"
    )
    effort.add_argument(
        "--round-to", type=int, metavar="N", help="channels are multiples of N (the quantum that is found)"
    )
    effort.add_argument("--seed", type=int, default=0, metavar="N", help="of the networks (%(default)s)")
    profile.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the table, such as dev.lat.json"
    )
    profile.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="staircase, and predicted against measured (.png, .svg, .pdf)",
    )
    verify = commands.add_parser(
        "verify",
        help="measure an architecture that was found for a latency, on its device",
        description="Measure the network of an architecture file beside its reference, in fresh processes on "
        "the device\nthat its latency was predicted for, and write down in the file what came out.",
    )
    verify.add_argument("architecture", type=Path, metavar="ARCH.yaml")
    verify.add_argument(
        "--device", metavar="DEVICE", help="which of this machine, such as cuda:1 (the one in the file)"
    )
    verify.add_argument(
        "--trust-code", action="store_true", help="import the code that the file's model names"
    )


def run_verify(options: argparse.Namespace) -> None:
    """Measure the network of a file on its device, and say whether the file's prediction holds.

    Raises:
        InfeasibleError: If the network is slower than the latency that it was found for.
    """
    from archsearch.settling import missed
    from archsearch.stopwatch import targets_in, verdict, verify_file

    path: Path = options.architecture
    architecture = verify_file(path, options.device, trust_code=options.trust_code, say=say)
    facts, targets = architecture.provenance["latency"], targets_in(architecture)
    show_result(verdict(facts, targets))
    show_result(f"wrote {path}")
    if targets and missed(facts, targets):
        raise InfeasibleError(f"{path}: is too slow on this device: find it again here, where it is measured")


def run_profile(options: argparse.Namespace) -> None:
    """Measure a table, write it, and say what it is worth."""
    if options.model is None:
        raise UsageError("give --model NAME")
    from archsearch import files
    from archsearch.latency.accuracy import assess
    from archsearch.latency.library import journal_of
    from archsearch.latency.meter import Settings
    from archsearch.latency.pictures import draw
    from archsearch.latency.profile import Profile
    from archsearch.on_device import allowed_of
    from archsearch.pictures import check_picture
    from archsearch.training.evaluation import resolve_device

    settings = Settings(
        runtime=options.runtime,
        device=str(resolve_device(options.device)),
        dtype=options.dtype,
        batch=options.batch,
        threads=options.threads,
        channels_last=options.layout == "channels_last",
        max_cells=options.max_cells,
        calibration=options.calibration,
        held_out=options.held_out,
        round_to=options.round_to,
        seed=options.seed,
        max_seconds=options.max_seconds,
        blocks=options.blocks,
    )
    check_picture(options.plot)
    files.probe(options.out.parent, 2**20)
    traced = traced_model(options)
    if options.drop_branches:
        traced = traced.with_branches()
    with _progress() as progress:
        profile = Profile(
            traced,
            allowed_of(traced),
            settings,
            journal=journal_of(options.out),
            say=say,
            progress=progress,
        )
        table = profile.run()
    table.write(options.out)
    profile.finish()
    report = assess(table)
    show_result(accuracy_table(report, table.quantum, table.reference_ms))
    for line in accuracy_verdict(report):
        show_result(line)
    show_result(f"wrote {options.out}")
    if options.plot is not None:
        draw(table, options.plot)
        show_result(f"wrote {options.plot}")


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar for each part on standard error, and nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    with Progress(
        *Progress.get_default_columns()[:2],
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as bars:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(f"{what}s", total=total)
            bars.update(tasks[what], completed=done)

        yield show


def accuracy_table(report: Any, quantum: int, reference_ms: float) -> Any:
    """Return what people read of a report."""
    from rich.table import Table

    networks = f"{report.table.networks} held-out networks"
    table = Table(title=f"{networks}; quantum {quantum}; reference {reference_ms:.3f} ms")
    for column in ("prediction", "MAPE %", "worst %", "within 5 %", "within 10 %", "Spearman", "Kendall"):
        table.add_column(column)
    table.add_column("Spearman at equal MACs")
    for name, found in {"latency table": report.table, **report.others}.items():
        table.add_row(
            name,
            f"{100 * found.mape:.1f}",
            f"{100 * found.worst:.1f}",
            f"{found.within_5:.2f}",
            f"{found.within_10:.2f}",
            f"{found.spearman:.3f}",
            f"{found.kendall:.3f}",
            f"{found.spearman_equal_macs:.3f}",
        )
    return table


def accuracy_verdict(report: Any) -> list[str]:
    """Return whether a table is good enough, and why not."""
    lines = [
        f"noise: a network measured twice differs by {report.noise:.1%}",
        "at equal MACs: not tested, since there are too few networks of equal MACs"
        if isnan(report.equal_spread)
        else f"spread of the latencies at equal MACs: {report.equal_spread:.1%}",
        f"in their 90 % interval: {report.coverage:.0%} of the held-out networks",
        f"in the one that predictions have: {report.coverage_in_use:.0%} of all, by cross-validation",
    ]
    if not report.complaints:
        return [*lines, "the table is good enough to search with"]
    return [*lines, *(f"not good enough: {complaint}" for complaint in report.complaints)]


COMMANDS: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "profile": run_profile,
    "verify": run_verify,
}
