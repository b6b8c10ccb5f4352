"""Networks on the plane of cost and accuracy, and which of them make the front."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from archsearch.results import GAIN, Arm, gain
from archsearch.search.export import finalist_file
from archsearch.targets import Resource

if TYPE_CHECKING:
    from archsearch.search.driver import Searched

RESOURCES: Mapping[Resource, str] = {
    "flops": "MACs kept, %",
    "params": "parameters kept, %",
    "latency": "predicted latency, ms",
}
"""What may stand against the accuracy, and its axis."""

REFERENCE = "reference"


@dataclass(frozen=True)
class Point:
    """A network that was trained with several seeds.

    Attributes:
        target: Name of its target's run directory; empty of the reference.
        network: ``"reference"``, ``"uniform"``, ``"search"`` or another finalist.
        cost: In the unit of ``RESOURCES``.
        macs: Multiply-adds of one image.
        params: Parameters.
        accuracies: Test accuracy in percent of each seed.
        gain: Over uniform widths at the target: points, and half of the 95 % interval.
        exported: Whether it is what was decided for at its target.
        architecture: Its file in the directory of the front.
    """

    target: str
    network: str
    cost: float
    macs: int
    params: int
    accuracies: Sequence[float]
    gain: tuple[float, float] | None = None
    exported: bool = False
    architecture: str | None = None

    @property
    def mean(self) -> float:
        """Mean test accuracy in percent."""
        return fmean(self.accuracies)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over the seeds; ``None`` with one."""
        return stdev(self.accuracies) if len(self.accuracies) > 1 else None


def points_of(resource: Resource, searches: Mapping[str, Searched]) -> list[Point]:
    """Return the reference and the finalists of all targets.

    Args:
        resource: Whose cost counts; a latency is as measured, or as predicted if the device is away.
        searches: By the name of their run directories.
    """
    first = next(iter(searches.values()))
    reference, conditions = first.record.arms[0], first.record.conditions
    cost = conditions["latency"]["reference_ms"] if resource == "latency" else 100.0
    found = [Point("", REFERENCE, cost, reference.macs, reference.params, reference.accuracies)]
    for place, searched in searches.items():
        found += _finalists(resource, place, searched)
    return found


def _finalists(resource: Resource, place: str, searched: Searched) -> Iterator[Point]:
    reference, *arms = searched.record.arms
    uniform = next(arm for arm in arms if arm.widths == "uniform")
    for arm in arms:
        if not arm.accuracies:
            continue  # it diverged
        yield Point(
            place,
            arm.widths,
            _cost(resource, arm, reference, searched.record.conditions),
            arm.macs,
            arm.params,
            arm.accuracies,
            gain(arm, uniform),
            arm.widths == searched.outcome.exported.name,
            f"{place}/{finalist_file(arm.widths)}",
        )


def _cost(resource: Resource, arm: Arm, reference: Arm, conditions: Mapping[str, Any]) -> float:
    if resource == "latency":
        if arm.latency is not None:
            return float(arm.latency * conditions["latency"]["reference_ms"])
        return float(conditions["latencies"][arm.widths]["predicted_ms"])
    if resource == "params":
        return 100 * arm.params / reference.params
    return 100 * arm.macs / reference.macs


def undominated(points: Sequence[Point]) -> list[Point]:
    """Return the points of which no other one costs no more and is as accurate, and better in one of both."""
    return [
        each
        for each in points
        if not any(
            other.cost <= each.cost
            and other.mean >= each.mean
            and (other.cost, other.mean) != (each.cost, each.mean)
            for other in points
        )
    ]


def table(points: Sequence[Point], resource: Resource) -> list[list[str]]:
    """Return the header and one row a point, as people read them."""
    front = undominated(points)
    header = ["target", "network", RESOURCES[resource], "test accuracy %", GAIN, "MACs", "params", "front"]
    return [header, *(_row(point, point in front) for point in points)]


def _row(point: Point, on_front: bool) -> list[str]:
    spread = "" if point.deviation is None else f" ± {point.deviation:.2f}"
    return [
        point.target or "-",
        f"{point.network}, exported" if point.exported else point.network,
        f"{point.cost:.4g}",
        f"{point.mean:.2f}{spread}",
        "-" if point.gain is None else f"{point.gain[0]:+.2f} ± {point.gain[1]:.2f}",
        f"{point.macs:,}",
        f"{point.params:,}",
        "yes" if on_front else "no",
    ]
