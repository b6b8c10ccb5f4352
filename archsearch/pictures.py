"""Where pictures may go, and matplotlib where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from archsearch.errors import UsageError

PICTURES = (".png", ".svg", ".pdf")


def check_picture(path: Path | None) -> None:
    """Check that a picture can be drawn into a file, before anything long has started.

    Raises:
        UsageError: If its kind is unknown, its directory missing or matplotlib not installed.
    """
    if path is None:
        return
    if path.suffix.lower() not in PICTURES:
        raise UsageError(f"{path}: a picture's name ends in {', '.join(PICTURES)}")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no directory {path.parent}; create it first")
    pyplot()


def pyplot() -> Any:
    """Return matplotlib's interface, set up to draw into files.

    Raises:
        UsageError: If it is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UsageError("pictures need matplotlib: pip install 'archsearch[plots]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
