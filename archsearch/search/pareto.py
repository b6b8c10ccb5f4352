"""The front of a search: what accuracy costs, by networks of several targets that are found together.

Each target has a study and finals of its own, in an ordinary run directory. What they share is what the model
learns from: it adds up curves of what each group keeps, and these hold at all targets, so that the trials of
one target tell something of the others. The offsets between targets are what the curves add up to.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

from archsearch import files
from archsearch.errors import UnknownNameError, UsageError
from archsearch.rebuild import Traced
from archsearch.search.driver import Driver, Searched
from archsearch.search.front_picture import draw_front
from archsearch.search.pictures import missing
from archsearch.search.points import RESOURCES, Point, points_of, table, undominated
from archsearch.search.quest import Quest
from archsearch.search.storage import FILE
from archsearch.targets import Resource, Target
from archsearch.trainer import Say, Trainer

ACCURACY = "accuracy"
AS_JSON, AS_TABLE = "front.json", "front.md"

_SHARED = (
    "model",
    "data",
    "recipe",
    "budget",
    "objective",
    "short",
    "trials",
    "finals",
    "seed",
    "proxy",
    "command",
    "versions",
    "date",
)
"""What a record says of all targets alike."""


@dataclass(frozen=True)
class Front(Searched):
    """What a search along a front gives: as a ``Searched``, the network of the first target, and all files.

    Attributes:
        searches: Of each target, by the name of its run directory.
        points: The reference, and the finalists of all targets.
    """

    searches: Mapping[str, Searched]
    points: Sequence[Point]


def resource_of(text: str) -> Resource:
    """Return what stands against the accuracy in ``"flops,accuracy"``.

    Raises:
        UsageError: If it is not a cost that a front has.
    """
    words = [word.strip() for word in text.split(",")]
    for resource in RESOURCES:
        if sorted(words) == sorted([resource, ACCURACY]):
            return resource
    known = " or ".join(f"{resource},{ACCURACY}" for resource in RESOURCES)
    raise UsageError(f"--pareto {text}: give {known}")


def check(targets: Sequence[Target]) -> None:
    """Raise UsageError if targets make no front."""
    for target in targets:
        if target.resource not in RESOURCES:
            raise UnknownNameError("resource of a front", target.resource, RESOURCES)
    names = [place_of(target) for target in targets]
    if len(set(names)) < max(2, len(names)):
        raise UsageError(f"--targets {','.join(names)}: a front has two targets or more, each once")


def place_of(target: Target) -> str:
    """Return the name of a target's run directory: ``0.3``, ``60000000`` or ``1.2ms``."""
    if target.keep is not None:
        return f"{float(target.keep):g}"
    return f"{target.absolute / 1e6:g}ms" if target.resource == "latency" else str(target.absolute)


def front(
    traced: Traced,
    quest: Quest,
    targets: Sequence[Target],
    trainer: Trainer,
    *,
    out: Path,
    say: Say = lambda line: None,
    **more: Any,
) -> Front:
    """Search at several targets of one resource with one model; the same call goes on where it was killed.

    All trials of all targets come first. Then the model is told all of them, and each target has its finals.

    Args:
        traced: The reference network.
        quest: How to search at each target; its own target of the resource is replaced.
        targets: Along the front.
        trainer: Trains, and keeps what it trained.
        out: Directory of the front, with a run directory for each target.
        say: Takes lines for the user.
        more: Further arguments of ``Driver``.

    Raises:
        UsageError: If the targets make no front, or the directory is that of one search.
        InfeasibleError: If no allowed widths meet one of them; before anything is trained.
    """
    check(targets)
    if (out / FILE).exists():
        raise UsageError(f"{out}: has a search of one target ({FILE}): give another --out")
    drivers = {
        place_of(target): Driver(
            traced, _aimed(quest, target), trainer, out=out / place_of(target), say=say, **more
        )
        for target in targets
    }
    with contextlib.ExitStack() as stack:
        for driver in drivers.values():
            stack.enter_context(driver.at_work())
        for target, driver in zip(targets, drivers.values(), strict=True):
            say(f"{target}: {quest.trials} trials")
            driver.explore()
        told = {name: driver.told() for name, driver in drivers.items()}
        searches = {}
        for target, (name, driver) in zip(targets, drivers.items(), strict=True):
            say(f"{target}: finals; the model knows the trials of all {len(targets)} targets")
            searches[name] = driver.finish([each for other, each in told.items() if other != name])
    resource = targets[0].resource
    points = list(points_of(resource, searches))
    first = next(iter(searches.values()))
    written = write(out, resource, points, searches, say)
    shown = {each.name: getattr(first, each.name) for each in fields(Searched)}
    shown["files"] = [*written, *chain.from_iterable(each.files for each in searches.values())]
    return Front(**shown, searches=searches, points=points)


def _aimed(quest: Quest, target: Target) -> Quest:
    """Return the quest with another target of the same resource."""
    others = [each for each in quest.plan.targets if each.resource != target.resource]
    return replace(quest, plan=replace(quest.plan, targets=[target, *others]))


def write(
    out: Path, resource: Resource, points: Sequence[Point], searches: Mapping[str, Searched], say: Say
) -> list[Path]:
    """Write the front, and draw it where matplotlib and plotly are installed; return the files.

    Args:
        out: Its directory.
        resource: Whose cost counts.
        points: Of the front.
        searches: By the name of their run directories.
        say: Is told where there is no picture.
    """
    verdicts = {place: searched.outcome.verdict for place, searched in searches.items()}
    searched = next(iter(searches.values()))
    title = [searched.record.conditions.get(name) for name in ("model", "data")]
    front = undominated(points)
    facts = {
        "resource": resource,
        "cost": RESOURCES[resource],
        "conditions": {name: fact for name, fact in searched.record.conditions.items() if name in _SHARED},
        "verdicts": verdicts,
        "points": [{**asdict(point), "on the front": point in front} for point in points],
    }
    files.write_json(out / AS_JSON, facts)
    header, *rows = table(points, resource)
    lines = [f"- {place}: {verdict}" for place, verdict in verdicts.items()]
    cells = [header, ["---"] * len(header), *rows]
    files.write_text(
        out / AS_TABLE, "\n".join([*lines, "", *(f"| {' | '.join(row)} |" for row in cells), ""])
    )
    written = [out / AS_JSON, out / AS_TABLE]
    if (lacking := missing()) is not None:
        say(lacking)
        return written
    return written + draw_front(points, resource, " · ".join(str(part) for part in title if part), out)
