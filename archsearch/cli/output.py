"""What goes to the terminal: progress to standard error, results to standard output."""

from __future__ import annotations

import os
import sys
from typing import Any


def say(line: str) -> None:
    """Tell the user what is going on; results go to standard output."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


def show_result(what: Any) -> None:
    """Print a result: a line, or a table as wide as it needs where there is no terminal."""
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
