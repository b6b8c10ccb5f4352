"""The colours and marks of a search, the same in all its pictures."""

from __future__ import annotations

from archsearch.results import Arm

# Colours that all kinds of colour vision tell apart (Okabe and Ito, 2008).
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#8A939B"
MAP = "cividis"
"""The scale of values; it has the same lightness for all kinds of colour vision."""

MARKS = ("D", "s", "^", "v", "P", "X")
"""Of the starts of a search, in their order, for matplotlib."""

SYMBOLS = ("diamond", "square", "triangle-up", "triangle-down", "cross", "x")
"""The same for plotly."""


def of_start(number: int) -> str:
    """Return the colour of a start; that of uniform widths, which come first, is orange."""
    return (ORANGE, GREEN, PURPLE, RED)[number % 4]


def colour_of(arm: Arm) -> str:
    """Return the colour of a finalist."""
    known = {"reference": GREY, "uniform": ORANGE, "search": BLUE}
    return known.get(arm.widths, GREEN)
