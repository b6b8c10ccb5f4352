"""The verbs: train the reference, prune it, keep the widths, rebuild, train, compare.

No step is done twice: trainings are found again by what decides them (``trainer``), and a killed run goes on.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from archsearch import files
from archsearch.allocation import ALLOCATIONS, select, solve
from archsearch.architecture import Architecture
from archsearch.errors import ArchsearchError, UsageError
from archsearch.graph import Selection
from archsearch.presets import Preset
from archsearch.pruners import PRUNERS, Context, inherit_weights
from archsearch.rebuild import Traced, load_weights
from archsearch.recipe import BUDGETS, Budget, Recipe
from archsearch.results import Arm, Record
from archsearch.space import SearchSpace
from archsearch.targets import Target
from archsearch.tensor_files import write_tensors
from archsearch.trainer import Say, Trained, Trainer, arm_of, is_main
from archsearch.training.determinism import derive_seed
from archsearch.training.evaluation import evaluate


@dataclass(frozen=True)
class Plan:
    """What to find, and how to compare it.

    Attributes:
        targets: What the widths must meet; empty with a preset.
        method: The pruner's name.
        allocation: The allocation's name; ``None`` for the method's own.
        preset: Published widths in place of a method's.
        space: Which widths are allowed.
        budget: How the found network is trained.
        published_cost: Whether Scratch-B counts FLOPs as Liu et al. publish them, instead of MACs.
        recipe: How the reference is trained; the budget stretches it.
        finetune: The budget of the fine-tuned arm.
        seeds: How many times each arm is trained.
        seed: The first seed.
    """

    targets: Sequence[Target] = ()
    method: str = "l1_norm"
    allocation: str | None = None
    preset: Preset | None = None
    space: SearchSpace = field(default_factory=SearchSpace)
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
            raise UsageError("nothing says how small: give --flops, --params or --memory, or a --preset")
        if self.targets and self.preset is not None:
            raise UsageError("a --preset has its own widths: leave out --flops, --params and --memory")
        replace(BUDGETS[self.budget], cap=self.budget_cap)  # checks the cap
        tuning = BUDGETS[self.finetune]
        if not (tuning.inherits and tuning.epochs_divisor):
            fitting = [name for name in BUDGETS if BUDGETS[name].inherits and BUDGETS[name].epochs_divisor]
            raise UsageError(f"--finetune {self.finetune}: does not fine-tune; give {' or '.join(fitting)}")
        ALLOCATIONS[self.allocation or PRUNERS[self.method].allocation]

    @property
    def label(self) -> str:
        """What the found widths are called in tables."""
        return self.method if self.preset is None else self.preset.name


@dataclass(frozen=True)
class Found:
    """What ``find`` gives.

    Attributes:
        architecture: The found architecture, as in its file.
        model: The found network, trained if anything was trained.
        record: Conditions and arms of the comparison.
        selection: Kept units of each group.
        files: What was written.
    """

    architecture: Architecture
    model: nn.Module
    record: Record
    selection: Selection
    files: Sequence[Path]


def find(
    traced: Traced,
    plan: Plan,
    trainer: Trainer | None,
    *,
    weights: str | None = None,
    trained: bool = False,
    out: Path | None = None,
    conditions: Mapping[str, Any] | None = None,
    say: Say = lambda line: None,
) -> Found:
    """Find the widths that meet a target, rebuild the network, train it and compare.

    Args:
        traced: The reference network.
        plan: What to find.
        trainer: Trains the arms; ``None`` with a budget of ``none``.
        weights: File with the reference's weights, which is then not trained.
        trained: Whether the reference's weights, as they are, are trained ones.
        out: Directory of the results; ``None`` writes nothing.
        conditions: What else to record about the run.
        say: Takes lines for the user.

    Raises:
        InfeasibleError: If no allowed widths meet the targets; before anything is trained.
        ArchsearchError: If the found network is not what the reference computes without the dropped channels.
    """
    search = _Search(traced, plan, trainer, say)
    provenance = _provenance(plan, conditions)
    # An impossible target, or conditions that no file can hold, show here, before anything is trained.
    traced.architecture(traced.graph.sizes, provenance)
    if out is not None:
        files.probe(out, 4 * search.reference_cost.params)
    search.uniform_widths()
    reference, references = search.references(weights, trained)
    selection = search.select(references[0])
    widths = {name: len(kept) for name, kept in selection.items()}
    verified = traced.verify(selection)
    if not verified.ok:
        raise ArchsearchError(f"the pruned {traced.name} {verified.problem}; this is a bug of archsearch")
    say(f"verified: equal to the reference without the dropped channels, to {verified.error:.0e}")

    architecture = traced.architecture(widths, provenance)
    written: list[Path] = []
    if out is not None and is_main():
        written += _write_architecture(architecture, out / "architecture.yaml")
    arms, model = search.compare(references[0], selection)
    record = Record(provenance, [reference, *arms])
    if out is not None and is_main():
        if trainer is not None or weights is not None or trained:
            write_tensors(out / "weights.safetensors", model.state_dict())
            written.append(out / "weights.safetensors")
        written += record.write(out)
    return Found(architecture, model, record, selection, written)


class _Search:
    """One run of ``find``."""

    def __init__(self, traced: Traced, plan: Plan, trainer: Trainer | None, say: Say) -> None:
        self._traced, self._plan, self._trainer, self._say = traced, plan, trainer, say
        self._budget: Budget = BUDGETS[plan.budget]
        if trainer is None and plan.budget != "none":
            raise UsageError(f"--budget {plan.budget} trains networks: give --data, or --budget none")
        if trainer is None and PRUNERS[plan.method].needs:
            raise UsageError(
                f"--method {plan.method} needs {', '.join(PRUNERS[plan.method].needs)}: give --data"
            )
        self._allowed = plan.space.allowed(traced.graph)
        self.reference_cost = traced.cost.reference

    def references(self, weights: str | None, trained: bool) -> tuple[Arm, list[nn.Module]]:
        """Return the arm of the reference and its network of each seed, one where its weights are given."""
        # A network in hand stays as it is: weights are loaded and modes changed in a copy.
        model, cost = copy.deepcopy(self._traced.model), self.reference_cost
        arm = Arm("reference", "reference", "reference", cost.macs, cost.params)
        if weights is not None:
            load_weights(model, weights)
        if weights is not None or trained or self._trainer is None:
            if weights is None and not trained:
                self._say("the reference has fresh random weights: nothing was trained (--budget none)")
            return replace(arm, accuracies=self._accuracies(model)), [model]
        results = [
            self._train("reference", self._fresh_reference(seed), self._plan.recipe, seed)
            for seed in self._seeds
        ]
        return arm_of(arm.name, "reference", "reference", cost, results), [r.model for r in results]

    def uniform_widths(self) -> dict[str, int]:
        """Return the widths of one keep ratio for all groups, at the target, or at the MACs of the preset."""
        targets = self._plan.targets
        if self._plan.preset is not None:
            cost = self._traced.cost.of(self._plan.preset.widths(self._traced.graph.sizes))
            targets = [Target("flops", absolute=cost.macs)]
        uniform = PRUNERS["uniform"]
        scores = uniform().score(Context(self._traced.model, self._traced.graph))
        return solve(self._traced.cost, ALLOCATIONS[uniform.allocation](scores), self._allowed, targets)

    def select(self, reference: nn.Module) -> Selection:
        """Return the units of each group that the method keeps."""
        plan = self._plan
        scores = PRUNERS[plan.method]().score(self._context(reference))
        if plan.preset is not None:
            widths = plan.preset.widths(self._traced.graph.sizes)
        else:
            allocation = ALLOCATIONS[plan.allocation or PRUNERS[plan.method].allocation]
            widths = solve(self._traced.cost, allocation(scores), self._allowed, plan.targets)
        cost = self._traced.cost.of(widths)
        macs, params = cost.macs / self.reference_cost.macs, cost.params / self.reference_cost.params
        self._say(
            f"{self._plan.label}: keeps {macs:.4f} of the MACs ({cost.macs:,}) "
            f"and {params:.4f} of the parameters ({cost.params:,})"
        )
        return select(scores, widths)

    def compare(self, reference: nn.Module, selection: Selection) -> tuple[list[Arm], nn.Module]:
        """Train all arms beside the reference; return them, and the found network of the first seed."""
        plan = self._plan
        arms: list[Arm] = []
        widths = {name: len(kept) for name, kept in selection.items()}
        cost = self._traced.cost.of(widths)
        pruned = inherit_weights(PRUNERS[plan.method](), self._context(reference), selection)
        if plan.budget == "none" or self._trainer is None:
            arms.append(
                Arm(
                    f"{plan.label}, not trained",
                    plan.label,
                    "none",
                    cost.macs,
                    cost.params,
                    accuracies=self._accuracies(pruned),
                )
            )
            return arms, pruned
        scratch = not self._budget.inherits
        if scratch and plan.method != "uniform":
            arms.append(self._scratch("uniform", self.uniform_widths())[0])
        tuning = plan.finetune if scratch else plan.budget
        tuned = [
            self._train(
                f"{plan.label}, {tuning}",
                copy.deepcopy(pruned),
                BUDGETS[tuning].recipe(plan.recipe),
                seed,
            )
            for seed in self._seeds
        ]
        arms.append(arm_of(f"{plan.label}, {tuning}", plan.label, tuning, cost, tuned))
        if not scratch:
            return arms, tuned[0].model
        arm, model = self._scratch(plan.label, widths)
        return [*arms, arm], model

    def _context(self, reference: nn.Module) -> Context:
        """Return what the method may look at: the reference and images of the train split."""
        batches = self._trainer.calibration if self._trainer is not None else None
        return Context(reference.cpu().eval(), self._traced.graph, self._plan.seed, batches)

    def _scratch(self, label: str, widths: Mapping[str, int]) -> tuple[Arm, nn.Module]:
        plan, cost = self._plan, self._traced.cost.of(widths)
        costs = [c.of_training(plan.published_cost) for c in (self.reference_cost, cost)]
        recipe = replace(self._budget, cap=plan.budget_cap).recipe(plan.recipe, *costs)
        name = f"{label}, {plan.budget}"
        results = [self._train(name, self._fresh(widths, seed), recipe, seed) for seed in self._seeds]
        return arm_of(name, label, plan.budget, cost, results), results[0].model

    def _train(self, label: str, model: nn.Module, recipe: Recipe, seed: int) -> Trained:
        if self._trainer is None:
            raise UsageError("there is no data to train with: give --data")
        label = f"{label}, seed {seed}" if self._plan.seeds > 1 else label
        return self._trainer.train(label, model, recipe, seed)

    def _fresh(self, widths: Mapping[str, int], seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "weights"))
            model, sliced = self._traced.fresh(widths)
        if sliced and seed == self._plan.seed:
            self._say(
                f"{len(sliced)} parameters hold a slice of what the model's code draws at full size: "
                f"{', '.join(sliced[:3])}{', …' if len(sliced) > 3 else ''}"
            )
        return model

    def _fresh_reference(self, seed: int) -> nn.Module:
        return self._fresh(self._traced.graph.sizes, seed)

    def _accuracies(self, model: nn.Module) -> tuple[float, ...]:
        """Return the test accuracy of a network as it is; nothing without data."""
        trainer = self._trainer
        if trainer is None:
            return ()
        batch_size = self._plan.recipe.batch_size
        return (evaluate(model, trainer.data.test, batch_size, trainer.device).accuracy,)

    @property
    def _seeds(self) -> range:
        return range(self._plan.seed, self._plan.seed + self._plan.seeds)


def _provenance(plan: Plan, conditions: Mapping[str, Any] | None) -> dict[str, Any]:
    return {
        "method": plan.method,
        "allocation": "preset" if plan.preset else plan.allocation or PRUNERS[plan.method].allocation,
        "target": ", ".join(map(str, plan.targets)) or plan.label,
        "budget": plan.budget,
        "seed": plan.seed,
        "seeds": plan.seeds,
        **(conditions or {}),
    }


def _write_architecture(architecture: Architecture, path: Path) -> list[Path]:
    """Write the file, unless the very same network stands there already: its date stays the first one."""
    if not path.exists() or Architecture.read(path).key != architecture.key:
        architecture.write(path)
    return [path]
