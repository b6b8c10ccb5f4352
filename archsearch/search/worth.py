"""What widths are worth, by each objective: what the reference says of them, or a training."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from archsearch.errors import ArchsearchError
from archsearch.rebuild import Traced
from archsearch.search.crew import Crew
from archsearch.search.inherit import inherited
from archsearch.search.quest import Quest
from archsearch.search.reference import Reference
from archsearch.search.trial import Scratch
from archsearch.search.work import Direct, Finding, Value, Work
from archsearch.trainer import Say, Trainer

Network = tuple[Mapping[str, int], int]
"""Widths and a seed."""

POLL_S = 0.25
"""Pause between two looks at the workers."""


@dataclass(frozen=True)
class Worth:
    """Finds out what widths are worth.

    Attributes:
        traced: The reference network.
        reference: The same, trained.
        scratch: How networks are trained with the whole budget.
        blind: A trainer that leaves the test set alone.
        crew: Who trains.
        out: The run directory.
        say: Takes lines for the user.
    """

    traced: Traced
    reference: Reference
    scratch: Scratch
    blind: Trainer
    crew: Crew
    out: Path
    say: Say

    @property
    def direct(self) -> Mapping[str, Value]:
        """The objectives that need no training."""
        return {"proxy": self._error, "inherit": self._inherited}

    def work(self, quest: Quest) -> Work:
        """Return who finds out the values of the trials; the caller closes it."""
        if quest.objective in self.direct:
            return Direct(self.direct[quest.objective])
        share = quest.short if quest.objective == "short" else 1.0
        return self.crew.tasks(self.out, self.scratch.shortened(share), self.blind, quest.objective, self.say)

    def trained(
        self, networks: Sequence[Network], what: str, place: str = "", share: float = 1.0
    ) -> Sequence[Finding]:
        """Have networks trained, as many at once as there are workers; return what ``carried_out`` does.

        Args:
            networks: Widths and seeds.
            what: They are trained for; a directory of the run.
            place: Their tasks' directory in that one.
            share: Of the epochs.
        """
        scratch = self.scratch.shortened(share)
        work = self.crew.tasks(self.out / what / place, scratch, self.blind, what, self.say)
        with contextlib.closing(work):
            return carried_out(work, networks, what, self.say)

    def _error(self, widths: Mapping[str, int], seed: int) -> float:
        return -float(sum(self.reference.curves[name][width] for name, width in widths.items()))

    def _inherited(self, widths: Mapping[str, int], seed: int) -> float:
        return inherited(self.traced, self.reference, self.reference.selection(widths), self.blind)


def carried_out(
    work: Work, networks: Sequence[Network], what: str = "networks", say: Say = lambda line: None
) -> list[Finding]:
    """Have networks trained, as many at once as there are slots, and return what was found of each.

    Those without a value, which is the validation accuracy in percent, diverged.

    Args:
        work: Is not closed.
        networks: Are numbered from 0.
        what: They are trained for.
        say: Takes lines for the user.

    Raises:
        ArchsearchError: If one could not be trained for another reason.
    """
    findings: dict[int, Finding] = {}
    waiting, running = list(range(len(networks))), set[int]()
    aside = work.slots > 1  # what trains here speaks for itself
    if aside:
        say(f"{what}: {len(networks)} trainings, {work.slots} at once")
    while waiting or running:
        while waiting and len(running) < work.slots:
            number = waiting.pop(0)
            running.add(number)
            work.begin(number, *networks[number])
        ended = {number: found for number in running if (found := work.found(number)) is not None}
        for number, found in ended.items():
            running.remove(number)
            if (own := found.shared()) is not None:
                raise own
            if found.reason is not None and found.reason[0] != "diverged":
                seed = networks[number][1]
                raise ArchsearchError(f"{what}: network {number + 1}, seed {seed}: {found.reason[1]}")
            findings[number] = found
            if aside:
                said = "diverged" if found.value is None else f"{found.value:.2f} % on validation images"
                say(f"{what}: {len(findings)} of {len(networks)}: {said}")
        if not ended:
            time.sleep(POLL_S)
    return [findings[number] for number in range(len(networks))]
