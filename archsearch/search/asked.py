"""What a user asks of a search, from words to objects; unknown words are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from archsearch.errors import UnknownNameError, UsageError
from archsearch.plan import NO_PROXY, Plan
from archsearch.search.crew import Crew
from archsearch.search.quest import Quest
from archsearch.search.rungs import Rungs
from archsearch.targets import Target

_QUEST = tuple(each.name for each in fields(Quest) if each.name not in ("plan", "informed"))
_CREW = {"jobs": "jobs", "engine": "engine", "engine_options": "options"}
SETTINGS = ("proxy", *_QUEST, *_CREW, "storage", "front")
"""What ``find`` takes in ``search``."""


@dataclass(frozen=True)
class Asked:
    """A search as it was asked for.

    Attributes:
        quest: How to search.
        crew: Who trains.
        storage: Address of a shared database, if one was given.
        front: The targets, where there are several.
    """

    quest: Quest
    crew: Crew
    storage: str | None
    front: Sequence[Target] = ()


def check(settings: Mapping[str, Any]) -> None:
    """Raise UnknownNameError if a setting is none."""
    for name in settings:
        if name not in SETTINGS:
            raise UnknownNameError("setting of a search", name, SETTINGS)


def asked(settings: Mapping[str, Any], plan: Plan, **workers: Any) -> Asked:
    """Return the search that settings describe.

    Args:
        settings: By the names in ``SETTINGS``; ``rungs`` may be a text such as ``"25,50"``.
        plan: What to find, with the proxy as its method if there is one.
        workers: What else workers must know, as fields of ``Crew``.

    Raises:
        UsageError: If a setting is wrong, or the plan asks for what a search has not.
    """
    check(settings)
    refused = {
        "--preset": plan.preset is not None,
        "--allocation": plan.allocation is not None,
        "--steps": plan.steps > 1,
        "--recalibrate": plan.recalibrate,
        "--budget-cap": plan.budget_cap is not None,
        "--seeds": plan.seeds > 1,
    }
    for option, given in refused.items():
        if given:
            hint = ": finalists get --finals fresh seeds" if option == "--seeds" else ""
            raise UsageError(f"{option} does not go with a search{hint}: leave it out")
    words = {name: settings[name] for name in _QUEST if name in settings}
    if not isinstance(words.get("rungs"), Rungs):
        words["rungs"] = Rungs.parse(words.get("rungs"))
    crew = {field: settings[name] for name, field in _CREW.items() if settings.get(name) is not None}
    words["informed"] = settings.get("proxy", NO_PROXY) != NO_PROXY
    return Asked(
        Quest(plan, **words), Crew(**crew, **workers), settings.get("storage"), settings.get("front", ())
    )
