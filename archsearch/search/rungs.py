"""Early stopping: at some shares of their schedule only the best of the trials go on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import optuna

from archsearch.errors import UsageError

FACTOR = 3
"""Of the trials that reach a single rung, one in so many goes on."""

SAMPLERS_THAT_STOP = ("tpe", "random")
"""Samplers that can learn from a trial that was stopped, or learn nothing from any."""


@dataclass(frozen=True)
class Rungs:
    """Shares of the schedule, in percent, at which a trial must be among the best.

    They are those of successive halving (``optuna.pruners.SuccessiveHalvingPruner``, without its brackets):
    each is a whole multiple of the one before, and of the trials that reach it one in as many goes on.

    Attributes:
        percents: Rising, such as 25 and 50.
    """

    percents: Sequence[int] = ()

    def __post_init__(self) -> None:
        text = ",".join(map(str, self.percents))
        if any(not 0 < each < 100 for each in self.percents):
            raise UsageError(f"--rungs {text}: shares of the schedule in percent, from 1 to 99")
        factor = self.factor
        if any(b != a * factor for a, b in zip(self.percents, self.percents[1:], strict=False)) or factor < 2:
            raise UsageError(
                f"--rungs {text}: each must be the same whole multiple of the one before, such as 25,50: "
                "that is also the share of the trials that go on, one in two"
            )

    @classmethod
    def parse(cls, text: str | None) -> Rungs:
        """Read ``25,50``.

        Raises:
            UsageError: If it breaks a rule.
        """
        try:
            return cls(tuple(int(part) for part in (text or "").split(",") if part))
        except ValueError:
            raise UsageError(f"--rungs {text}: give percents of the schedule, such as 25,50") from None

    def check(self, sampler: str, trains: bool) -> None:
        """Check that a search may stop trials.

        Raises:
            UsageError: If its sampler needs all values in full, or nothing is trained.
        """
        if not self.percents:
            return
        if not trains:
            raise UsageError("--rungs: this --objective trains nothing that could be stopped")
        if sampler not in SAMPLERS_THAT_STOP:
            raise UsageError(
                f"--rungs with --sampler {sampler}: it compares values, and those of a stopped trial are of "
                f"less training: leave --rungs out, or take one of {', '.join(SAMPLERS_THAT_STOP)}"
            )

    @property
    def factor(self) -> int:
        """One in so many trials goes on at each rung."""
        return self.percents[1] // self.percents[0] if len(self.percents) > 1 else FACTOR

    @property
    def pruner(self) -> optuna.pruners.BasePruner:
        """What decides, in Optuna's words."""
        if not self.percents:
            return optuna.pruners.NopPruner()
        return optuna.pruners.SuccessiveHalvingPruner(
            min_resource=self.percents[0], reduction_factor=self.factor
        )

    def reached(self, before: int, now: int) -> bool:
        """Return whether a rung lies between two percents, the second included."""
        return any(before < each <= now for each in self.percents)


EVERYTHING = Rungs()
"""No rungs: nothing is stopped."""
