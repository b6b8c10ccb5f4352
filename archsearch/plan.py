"""What to find and how to compare it, checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from archsearch.allocation import ALLOCATIONS
from archsearch.errors import UsageError
from archsearch.presets import Preset
from archsearch.pruners import Pruner, make_pruner
from archsearch.recipe import BUDGETS, Recipe
from archsearch.space import SearchSpace
from archsearch.targets import Target

NO_PROXY = "uniform"
"""What a search starts from without a pruner's curves: the belief that uniform widths are hard to beat."""


@dataclass(frozen=True)
class Plan:
    """What to find, and how to compare it.

    Attributes:
        targets: What the widths must meet; empty with a preset.
        method: The pruner's name.
        options: Its hyper-parameters that differ from the published ones.
        allocation: The allocation's name; ``None`` for the method's own.
        preset: Published widths in place of a method's.
        space: Which widths are allowed.
        steps: In how many steps the reference is pruned, with a recovery between two.
        recover: Epochs of each recovery.
        recalibrate: Whether batch norms get fresh statistics after each cut.
        budget: How the found network is trained.
        published_cost: Whether Scratch-B counts FLOPs as Liu et al. publish them, instead of MACs.
        recipe: How the reference is trained; the budget stretches it.
        finetune: The budget of the fine-tuned arm and of recoveries; ``"none"`` for no such arm.
        seeds: How many times each arm is trained.
        seed: The first seed.
    """

    targets: Sequence[Target] = ()
    method: str = "l1_norm"
    options: Mapping[str, Any] = field(default_factory=dict)
    allocation: str | None = None
    preset: Preset | None = None
    space: SearchSpace = field(default_factory=SearchSpace)
    steps: int = 1
    recover: int = 1
    recalibrate: bool = False
    budget: str = "scratch-b"
    budget_cap: float | None = None
    published_cost: bool = False
    recipe: Recipe = field(default_factory=Recipe)
    finetune: str = "finetune"
    seeds: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise UsageError(f"--seeds {self.seeds}: at least 1")
        if not self.targets and self.preset is None:
            raise UsageError(
                "nothing says how small: give --flops, --params, --memory, --channels or --latency, "
                "or a --preset"
            )
        if self.targets and self.preset is not None:
            raise UsageError(
                "a --preset has its own widths: leave out --flops, --params, --memory, --channels "
                "and --latency"
            )
        if self.steps < 1 or self.recover < 1:
            raise UsageError(f"--steps {self.steps} --recover {self.recover}: both are at least 1")
        if self.steps > 1 and self.preset is not None:
            raise UsageError("--steps goes to a target step by step: a --preset has its widths, leave it out")
        replace(BUDGETS[self.budget], cap=self.budget_cap)  # checks the cap
        tuning = BUDGETS[self.finetune]
        if not tuning.inherits:
            fitting = [name for name in BUDGETS if BUDGETS[name].inherits]
            raise UsageError(f"--finetune {self.finetune}: does not fine-tune; give {' or '.join(fitting)}")
        ALLOCATIONS[self.allocation_name]

    @cached_property
    def pruner(self) -> Pruner:
        """The method with its hyper-parameters."""
        return make_pruner(self.method, self.options)

    @property
    def allocation_name(self) -> str:
        """The allocation that was asked for, or the method's own."""
        return self.allocation or self.pruner.allocation

    def drops_branches(self, sizes: Mapping[str, int]) -> bool:
        """Return whether groups may have width 0, as the space or the preset says."""
        return self.space.drop_branches or (
            self.preset is not None and 0 in self.preset.widths(sizes).values()
        )

    @property
    def label(self) -> str:
        """What the found widths are called in tables."""
        if self.preset is not None:
            return self.preset.name
        return self.method if self.allocation is None else f"{self.method}:{self.allocation}"
