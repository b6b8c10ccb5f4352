"""What a search is for, and how it goes about it; checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from archsearch.allocation import ALLOCATIONS
from archsearch.errors import UsageError
from archsearch.plan import NO_PROXY, Plan
from archsearch.pruners import PRUNERS, Sparsifying
from archsearch.search import defaults
from archsearch.search.objectives import OBJECTIVES
from archsearch.search.rungs import EVERYTHING, Rungs
from archsearch.search.sampler import MODEL, SAMPLERS


@dataclass(frozen=True)
class Quest:
    """How to search.

    Attributes:
        plan: Targets, space, recipe and budget; its method is the pruner that is looked at, its seed that of
            the search.
        informed: Whether the model starts from that pruner's curves, the *proxy*, and not from the belief
            that uniform widths are hard to beat.
        interactions: Whether the model has products of neighbouring groups.
        trials: How many networks to look at.
        objective: What they are worth; ``archsearch list objectives``.
        sampler: ``model``, or one of Optuna's; ``archsearch list samplers``.
        short: Share of the epochs with ``short``.
        finals: How many fresh seeds each finalist gets.
        thompson: Share of the model's trials that are drawn from its posterior.
        top: How many of the best trials are finalists; ``None`` for one where Optuna samples, which has no
            recommendation of its own, and none where the model does.
        baselines: Methods whose widths are finalists beside uniform ones, each ``NAME`` with the allocation
            of its paper or ``NAME:ALLOCATION``; ``None`` for the knapsack of the plan's.
        calibrate: With how many networks to measure, before the search, how well each objective ranks.
        rungs: Where trials may be stopped early.
    """

    plan: Plan
    informed: bool = False
    interactions: bool = False
    trials: int = defaults.TRIALS
    objective: str = defaults.OBJECTIVE
    sampler: str = defaults.SAMPLER
    short: float = defaults.SHORT
    finals: int = defaults.FINALS
    thompson: float = defaults.THOMPSON
    top: int | None = None
    baselines: Sequence[str] | None = None
    calibrate: int = defaults.CALIBRATE
    rungs: Rungs = EVERYTHING

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise UsageError(f"--trials {self.trials}: at least 1")
        if not 0 < self.short <= 1:
            raise UsageError(f"--short {self.short:g}: a share of the epochs, in (0, 1]")
        if self.finals < 2:
            raise UsageError(f"--finals {self.finals}: an interval needs 2 seeds or more")
        if self.top is not None and self.top < 0:
            raise UsageError(f"--top {self.top}: 0 or more of the best trials")
        if self.calibrate and self.calibrate < 5:
            raise UsageError(f"--calibrate {self.calibrate}: a rank correlation needs 5 networks or more")
        self.rungs.check(self.sampler, OBJECTIVES[self.objective].trains)
        if self.sampler != MODEL:
            SAMPLERS[self.sampler]
        if not self.plan.targets:
            raise UsageError(
                "nothing says how small: give --flops, --params, --memory, --channels or --latency"
            )
        if isinstance(self.plan.pruner, Sparsifying):
            raise UsageError(
                f"--proxy {self.plan.method} trains the reference its own way: take one that looks at a "
                "plainly trained one, such as l1_norm or taylor; it can be one of the --baselines"
            )
        for name in self.baseline_names:
            method, _, allocation = name.partition(":")
            PRUNERS[method]
            if allocation:
                ALLOCATIONS[allocation]
        if len(set(self.baseline_names)) < len(self.baseline_names):
            raise UsageError(f"--baselines {','.join(self.baseline_names)}: one stands twice")

    @property
    def allocated(self) -> str:
        """What the knapsack of the pruner's curves is called in tables."""
        return f"{self.plan.method}:knapsack"

    @property
    def proxy(self) -> str:
        """What the model starts from, in words."""
        return self.plan.label if self.informed else NO_PROXY

    @property
    def baseline_names(self) -> Sequence[str]:
        """The methods that the recommendation meets in the finals, uniform widths aside."""
        return [self.allocated] if self.baselines is None else self.baselines

    @property
    def best_trials(self) -> int:
        """How many of the best trials are finalists."""
        return self.top if self.top is not None else int(self.sampler != MODEL)

    def facts(self) -> dict[str, Any]:
        """Return what a record says of it."""
        plan = self.plan
        return {
            "method": "search",
            "target": ", ".join(map(str, plan.targets)),
            "proxy": self.proxy,
            **({"interactions": True} if self.interactions else {}),
            **({"options": dict(plan.options)} if plan.options else {}),
            "objective": self.objective,
            **({"short": self.short} if self.objective == "short" else {}),
            "sampler": self.sampler,
            **({"thompson": self.thompson} if self.thompson else {}),
            "trials": self.trials,
            "budget": plan.budget,
            "seed": plan.seed,
            "finals": self.finals,
        }

    def identity(self) -> Mapping[str, Any]:
        """Return what decides the values of its trials, beside network, data and space."""
        plan = self.plan
        return {
            "targets": [str(target) for target in plan.targets],
            "objective": self.objective,
            **({"short": self.short} if self.objective == "short" else {}),
            "method": plan.label,
            # Points drawn from what the model believes depend on what it started from.
            **({"proxy": self.proxy} if self.thompson else {}),
            **({"interactions": True} if self.thompson and self.interactions else {}),
            **({"options": dict(plan.options)} if plan.options else {}),
            "recipe": plan.recipe.as_dict(),
            "budget": plan.budget,
            "sampler": self.sampler,
            "thompson": self.thompson,
            **({"rungs": list(self.rungs.percents)} if self.rungs.percents else {}),
            "seed": plan.seed,
        }
