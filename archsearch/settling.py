"""Latency targets that are met by what was measured, not by what was predicted.

A table predicts within a few percent, and its interval is what the solver keeps to. So the widths that it
gives are mostly somewhat faster than they need to be, and now and then too slow. They are measured before
anything is trained on them; where the measurement is off, the limit moves by as much, and the widths are
solved for again. Between a limit that gave something too fast and one that gave something too slow the next
one is interpolated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from archsearch.architecture import Architecture
from archsearch.errors import InfeasibleError
from archsearch.targets import Target

MEASUREMENTS = 3
"""Networks at most that are measured for one method."""

SOLUTIONS = 12
"""At most: where widths are coarse, a limit moves several times before other ones meet it."""

CLOSE = 0.97
"""Share of the limit from which on a network is as slow as it may be."""

AIM = 0.99
"""Share of the limit that is aimed at: a measurement repeats to about one percent."""

Facts = Mapping[str, Any]
Found = TypeVar("Found")
Point = tuple[float, float]
"""A factor of the limit, and the share of the allowed latency that what it gave uses."""


class Clock(Protocol):
    """Says how long a network takes on the device of a latency target."""

    def __call__(self, architecture: Architecture) -> Facts:
        """Return ``measured_share`` if ``verified``, and what was predicted."""
        ...


def used(facts: Facts, targets: Sequence[Target]) -> float:
    """Return the measured latency as a share of the tightest limit on it; above 1 a target is missed.

    A time is compared with the share of the reference's time in the table: what a busy machine adds to the
    milliseconds of today, it adds to both.
    """
    share = float(facts["measured_share"])
    return max(
        share / float(target.keep)
        if target.keep is not None
        else share * float(facts["reference_ms"]) * 1e6 / target.absolute
        for target in targets
        if target.resource == "latency"
    )


def missed(facts: Facts, targets: Sequence[Target]) -> bool:
    """Return whether a network was measured and is slower than a target allows."""
    return bool(facts["verified"]) and used(facts, targets) > 1


def share_in(facts: Facts | None) -> float | None:
    """Return the measured share of the reference's latency; ``None`` if nothing was measured."""
    return float(facts["measured_share"]) if facts is not None and facts["verified"] else None


def settle(
    solve: Callable[[list[Target]], Found],
    rebuilt: Callable[[Found], Architecture],
    targets: Sequence[Target],
    clock: Clock,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Found, Facts]:
    """Solve for widths, measure them, and solve again while the measurement is off.

    Args:
        solve: Gives what meets targets by prediction.
        rebuilt: Gives the network of that.
        targets: One of them a latency.
        clock: Measures a network; where it only predicts, the first solution is taken.
        say: Takes lines for the user.

    Returns:
        The slowest solution that meets the targets as measured, or the fastest one if none does, and what
        the clock said of it.
    """
    factor = 1.0
    tried: list[tuple[float, Found, Facts]] = []
    shares: dict[str, float] = {}
    points: list[Point] = []
    for _ in range(SOLUTIONS):
        try:
            found = solve([each.scaled(factor) if each.resource == "latency" else each for each in targets])
        except InfeasibleError:
            if not tried:
                raise
            break
        architecture = rebuilt(found)
        share = shares.get(architecture.key)
        if share is not None and share <= 1:
            break  # something else holds it: a wider limit changes nothing
        if share is None:
            facts = clock(architecture)
            if not facts["verified"]:
                return found, facts
            share = shares[architecture.key] = used(facts, targets)
            say(f"measured: uses {share:.3f} of the latency that the target allows")
            tried.append((share, found, facts))
        if CLOSE <= share <= 1 or len(tried) == MEASUREMENTS:
            break
        points.append((factor, share))
        factor = _next(points)
    meeting = [each for each in tried if each[0] <= 1]
    best = max(meeting, key=_share) if meeting else min(tried, key=_share)
    if len(tried) > 1:
        say(f"takes the one that uses {best[0]:.3f}")
    return best[1], best[2]


def _next(points: Sequence[Point]) -> float:
    """Return the factor of the limit to solve for after others, of which the last one was off."""
    fast = max((point for point in points if point[1] <= 1), default=None)
    slow = min((point for point in points if point[1] > 1), default=None)
    if fast is None or slow is None:
        factor, share = points[-1]
        return factor * AIM / share
    (below, low), (above, high) = fast, slow
    return below + (above - below) * (AIM - low) / (high - low)


def _share(tried: tuple[float, Any, Facts]) -> float:
    return tried[0]
