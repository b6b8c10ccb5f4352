"""What a person sees of a search: ``dashboard`` and ``plots``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from archsearch.cli.output import say, show_result


def add_commands(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the parsers of the commands."""
    dashboard = commands.add_parser(
        "dashboard",
        help="show a search in the browser, while it runs or afterwards",
        description="Serve Optuna's dashboard of a search on 127.0.0.1: its trials, notes, pictures and "
        "architecture files.\nIt only reads, and may run beside the search. Ctrl-C ends it.\nOf a study that "
        "drivers share give all run directories: each driver keeps the files of its own trials.",
    )
    dashboard.add_argument(
        "runs",
        nargs="*",
        type=Path,
        default=[Path("runs")],
        metavar="RUN",
        help="run directory of a search, or a directory of runs: the newest search in it (runs)",
    )
    dashboard.add_argument(
        "--port", type=int, default=8080, metavar="N", help="0 takes a free one (%(default)s)"
    )
    dashboard.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name under which a proxy of yours reaches it",
    )
    dashboard.add_argument(
        "--allow-edit",
        action="store_true",
        help="notes, trials and studies may be changed and deleted; not while the search runs",
    )
    plots = commands.add_parser(
        "plots",
        help="draw the plots of a search",
        description="Draw the plots of a search into RUN/plots: a page to look at with the mouse "
        "(search.html), and PNG files.",
    )
    plots.add_argument("run", type=Path, metavar="RUN", help="run directory of a search")


def run_dashboard(options: argparse.Namespace) -> None:
    """Serve until the user stops it."""
    from archsearch.search.dashboard import HOST, chosen, serving

    first, *beside = options.runs
    run, others = chosen(first)
    if others:
        say(f"{run} is the newest of {len(others) + 1} searches; the others: {', '.join(map(str, others))}")
    hosts, edit = options.allowed_host, options.allow_edit
    with serving(run, beside=beside, port=options.port, hosts=hosts, allow_edit=edit) as server:
        how = "may be edited" if edit else "read-only"
        show_result(f"{run}: http://{HOST}:{server.server_port}/dashboard ({how}; Ctrl-C ends)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("the dashboard has ended")


def run_plots(options: argparse.Namespace) -> None:
    """Draw, and name the files written."""
    from archsearch.search.page import write_plots

    for path in write_plots(options.run):
        show_result(f"wrote {path}")


COMMANDS: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "dashboard": run_dashboard,
    "plots": run_plots,
}
"""The commands and what runs them."""
