"""What a network may be worth in a search; the test set is closed to all of them."""

from __future__ import annotations

from dataclasses import dataclass

from archsearch.registry import Registry


@dataclass(frozen=True)
class Objective:
    """A way to say what widths are worth.

    Attributes:
        about: One line for people.
        unit: What its values are, for axes and notes.
        trains: Whether networks are trained for it.
    """

    about: str
    unit: str
    trains: bool


OBJECTIVES: Registry[Objective] = Registry("objective")

OBJECTIVES.register("proxy")(
    Objective(
        "minus the error that the proxy's curves say; nothing is trained", "proxy: minus its error", False
    )
)
OBJECTIVES.register("inherit")(
    Objective(
        "the reference's weights in the units that the proxy's pruner keeps, batch norms recalibrated",
        "validation accuracy, inherited weights, %",
        False,
    )
)
OBJECTIVES.register("short")(
    Objective(
        "trained from scratch for a share of the epochs (--short)",
        "validation accuracy (short training), %",
        True,
    )
)
OBJECTIVES.register("full")(
    Objective("trained from scratch as long as the finals", "validation accuracy (full training), %", True)
)
