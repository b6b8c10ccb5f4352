"""The verbs: train the reference, prune it, keep the widths, rebuild, train, compare.

No step is done twice: trainings are found again by what decides them (``trainer``), and a killed run goes on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from archsearch import files
from archsearch.architecture import Architecture
from archsearch.errors import ArchsearchError, UsageError
from archsearch.graph import ChannelGraph, Selection
from archsearch.plan import Plan
from archsearch.pruners import SparseTraining, Sparsifying, options_of
from archsearch.pruning import Learned, Pruned, prune, targets_at, uniform_widths
from archsearch.rebuild import Traced, load_weights
from archsearch.recipe import BUDGETS, Budget, Recipe
from archsearch.results import Arm, Record
from archsearch.settling import Clock, Facts, settle, share_in
from archsearch.targets import Target
from archsearch.tensor_files import write_tensors
from archsearch.trainer import Say, Trained, Trainer, arm_of, is_main
from archsearch.training.determinism import stream
from archsearch.training.evaluation import evaluate


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
    clock: Clock | None = None,
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
        clock: Measures networks for a latency target, before they are trained; see ``settle``.
        out: Directory of the results; ``None`` writes nothing.
        conditions: What else to record about the run.
        say: Takes lines for the user.

    Raises:
        InfeasibleError: If no allowed widths meet the targets; before anything is trained.
        ArchsearchError: If the found network is not what the reference computes without the dropped channels.
    """
    if plan.drops_branches(traced.graph.sizes):
        traced = traced.with_branches()
    search = _Search(traced, plan, trainer, say, clock)
    provenance = _provenance(plan, conditions)
    # An impossible target, or conditions that no file can hold, show here, before anything is trained.
    traced.architecture(traced.graph.sizes, provenance)
    if out is not None:
        files.probe(out, 4 * search.reference_cost.params)
    search.uniform_widths(plan.targets)
    arms, reference = search.references(weights, trained)
    pruned, latency = search.settled(reference)
    if latency is not None:
        provenance["latency"] = dict(latency)
    selection = pruned.selection
    widths = {name: len(kept) for name, kept in selection.items()}
    gone = [branch.name for branch in traced.graph.vanished(widths)]
    if traced.graph.branches:
        names = f": {', '.join(gone)}" if gone else ""
        say(f"drops {len(gone)} of {len(traced.graph.branches)} residual branches{names}")
    verified = traced.verify(selection)
    if not verified.ok:
        raise ArchsearchError(f"the pruned {traced.name} {verified.problem}; this is a bug of archsearch")
    say(f"verified: equal to the reference without the dropped channels, to {verified.error:.0e}")

    architecture = traced.architecture(widths, provenance, selection)
    written: list[Path] = []
    if out is not None and is_main():
        written.append(write_architecture(architecture, out / "architecture.yaml"))
    compared, model = search.compare(pruned, latency)
    record = Record(provenance, [*arms, *compared])
    if out is not None and is_main():
        if trainer is not None or weights is not None or trained:
            write_tensors(out / "weights.safetensors", model.state_dict())
            written.append(out / "weights.safetensors")
        written += record.write(out)
    return Found(architecture, model, record, selection, written)


def widths_by(
    traced: Traced,
    plan: Plan,
    trainer: Trainer,
    *,
    weights: str | None = None,
    trained: bool = False,
    say: Say = lambda line: None,
) -> Callable[[Sequence[Target]], dict[str, int]]:
    """Return what gives a method's widths at targets; trains what it prunes, and nothing of what it finds.

    Args:
        traced: The reference network.
        plan: How to find them; where the method trains the reference its own way, its targets say what for.
        trainer: Trains the reference; a blind one leaves the test set alone.
        weights: As for ``find``.
        trained: As for ``find``.
        say: Takes lines for the user.
    """
    search = _Search(traced, plan, trainer, say)
    _, reference = search.references(weights, trained)
    return lambda targets: _widths(search.prune(reference, targets))


class _Search:
    """One run of ``find``."""

    def __init__(
        self, traced: Traced, plan: Plan, trainer: Trainer | None, say: Say, clock: Clock | None = None
    ) -> None:
        self._traced, self._plan, self._trainer, self._say = traced, plan, trainer, say
        self._clock = clock if any(target.resource == "latency" for target in plan.targets) else None
        self._budget: Budget = BUDGETS[plan.budget]
        if trainer is None and plan.budget != "none":
            raise UsageError(f"--budget {plan.budget} trains networks: give --data, or --budget none")
        if trainer is None and plan.pruner.needs:
            raise UsageError(f"--method {plan.method} needs {', '.join(plan.pruner.needs)}: give --data")
        if trainer is None and (plan.recalibrate or plan.steps > 1):
            raise UsageError("--recalibrate and --steps look at training images: give --data")
        self._allowed = plan.space.allowed(traced.graph)
        self.reference_cost = traced.cost.reference

    def references(self, weights: str | None, trained: bool) -> tuple[list[Arm], Learned]:
        """Return the arms of the reference, and what the method prunes: its network of the first seed.

        Where its weights are given there is one network, and it is not trained; where the method trains the
        reference its own way there is a second arm, of the first seed.
        """
        # A network in hand stays as it is: weights are loaded and modes changed in a copy.
        model, cost = copy.deepcopy(self._traced.model), self.reference_cost
        given = weights is not None or trained
        if weights is not None:
            load_weights(model, weights)
        if given or self._trainer is None:
            if not given:
                self._say("the reference has fresh random weights: nothing was trained (--budget none)")
            arm = Arm("reference", "reference", "reference", cost.macs, cost.params)
            arms = [replace(arm, accuracies=self._accuracies(model))]
        else:
            results = [
                self._train("reference", self._fresh_reference(seed), self._plan.recipe, seed)
                for seed in self._seeds
            ]
            arms = [arm_of("reference", "reference", "reference", cost, results)]
            model = results[0].model
        if not isinstance(self._plan.pruner, Sparsifying):
            return arms, Learned(model)
        start = model if given else self._fresh_reference(self._plan.seed)
        widths = uniform_widths(
            self._traced.cost, self._allowed, targets_at(self._plan, self._traced.cost, 1)
        )
        name = f"{self._plan.label}, sparse training"
        training = self._plan.pruner.sparse_training(start, self._traced.graph, widths)
        learned, result = self._train_sparsely(name, training, self._plan.recipe)
        return [*arms, arm_of(name, "reference", "sparse training", cost, [result])], learned

    def uniform_widths(self, targets: Sequence[Target]) -> dict[str, int]:
        """Return the widths of one keep ratio for all groups, at targets, or at the MACs of the preset."""
        if self._plan.preset is not None:
            cost = self._traced.cost.of(self._plan.preset.widths(self._traced.graph.sizes))
            targets = [Target("flops", absolute=cost.macs)]
        return uniform_widths(self._traced.cost, self._allowed, list(targets))

    def settled(self, reference: Learned) -> tuple[Pruned, Facts | None]:
        """Return what the method leaves at the plan's targets, and what the clock says of it."""
        if self._clock is None:
            return self.prune(reference, self._plan.targets), None
        return settle(
            lambda targets: self.prune(reference, targets),
            lambda pruned: self._traced.architecture(_widths(pruned), {}, pruned.selection),
            self._plan.targets,
            self._clock,
            self._say,
        )

    def _settled_uniform(self) -> tuple[dict[str, int], Facts | None]:
        """Return uniform widths at the plan's targets, and what the clock says of them."""
        if self._clock is None:
            return self.uniform_widths(self._plan.targets), None
        self._say("uniform widths, to compare with:")
        return settle(
            self.uniform_widths, self._traced.architecture, self._plan.targets, self._clock, self._say
        )

    def prune(self, reference: Learned, targets: Sequence[Target]) -> Pruned:
        """Return what the method leaves of a trained reference at targets."""
        batches = self._trainer.calibration if self._trainer is not None else None
        plan = replace(self._plan, targets=targets)
        pruned = prune(self._traced, plan, reference, batches, self._recover)
        cost = self._traced.cost.of(_widths(pruned))
        macs, params = cost.macs / self.reference_cost.macs, cost.params / self.reference_cost.params
        self._say(
            f"{self._plan.label}: keeps {macs:.4f} of the MACs ({cost.macs:,}) "
            f"and {params:.4f} of the parameters ({cost.params:,})"
        )
        return pruned

    def compare(self, found: Pruned, latency: Facts | None) -> tuple[list[Arm], nn.Module]:
        """Train all arms beside the reference; return them, and the found network of the first seed.

        Args:
            found: What the method leaves.
            latency: What the clock says of it.
        """
        plan = self._plan
        arms: list[Arm] = []
        widths = _widths(found)
        cost = self._traced.cost.of(widths)
        if plan.budget == "none" or self._trainer is None:
            arms.append(
                Arm(
                    f"{plan.label}, not trained",
                    plan.label,
                    "none",
                    cost.macs,
                    cost.params,
                    accuracies=self._accuracies(found.model),
                    latency=share_in(latency),
                )
            )
            return arms, found.model
        scratch = not self._budget.inherits
        if scratch and plan.method != "uniform":
            uniform, seen = self._settled_uniform()
            arms.append(self._scratch("uniform", uniform, seen)[0])
        tuning = plan.finetune if scratch else plan.budget
        if tuning != "none":
            name, recipe = f"{plan.label}, {tuning}", BUDGETS[tuning].recipe(plan.recipe)
            tuned = [self._train(name, copy.deepcopy(found.model), recipe, seed) for seed in self._seeds]
            arm = arm_of(name, plan.label, tuning, cost, tuned)
            arms.append(replace(arm, latency=share_in(latency)))
            if not scratch:
                return arms, tuned[0].model
        arm, model = self._scratch(plan.label, widths, latency, found.selection)
        return [*arms, arm], model

    def _recover(
        self, model: nn.Module, graph: ChannelGraph, widths: Mapping[str, int], step: int
    ) -> Learned:
        """Train a network on after a step of pruning, in the method's own way if it has one."""
        plan = self._plan
        tuning = BUDGETS["finetune" if plan.finetune == "none" else plan.finetune]
        recipe = tuning.recipe(plan.recipe).with_(epochs=plan.recover)
        name = f"{plan.label}, recovery {step} of {plan.steps - 1}"
        if isinstance(plan.pruner, Sparsifying):
            return self._train_sparsely(name, plan.pruner.sparse_training(model, graph, widths), recipe)[0]
        return Learned(self._train(name, model, recipe, plan.seed).model)

    def _train_sparsely(self, name: str, training: SparseTraining, recipe: Recipe) -> tuple[Learned, Trained]:
        """Train a network as the method asks for, so that what it will remove fades."""
        identity = {"method": self._plan.method, "options": options_of(self._plan.pruner)}
        result = self._train(
            name,
            training.network,
            recipe,
            self._plan.seed,
            callbacks=training.callbacks,
            identity={**identity, **training.identity},
        )
        return Learned(training.plain(), training.network), result

    def _scratch(
        self,
        label: str,
        widths: Mapping[str, int],
        latency: Facts | None,
        selection: Selection | None = None,
    ) -> tuple[Arm, nn.Module]:
        plan, cost = self._plan, self._traced.cost.of(widths)
        costs = [c.of_training(plan.published_cost) for c in (self.reference_cost, cost)]
        recipe = replace(self._budget, cap=plan.budget_cap).recipe(plan.recipe, *costs)
        name = f"{label}, {plan.budget}"
        results = [
            self._train(name, self._fresh(widths, seed, selection), recipe, seed) for seed in self._seeds
        ]
        arm = arm_of(name, label, plan.budget, cost, results)
        return replace(arm, latency=share_in(latency)), results[0].model

    def _train(self, label: str, model: nn.Module, recipe: Recipe, seed: int, **how: Any) -> Trained:
        if self._trainer is None:
            raise UsageError("there is no data to train with: give --data")
        label = f"{label}, seed {seed}" if self._plan.seeds > 1 else label
        return self._trainer.train(label, model, recipe, seed, **how)

    def _fresh(self, widths: Mapping[str, int], seed: int, selection: Selection | None = None) -> nn.Module:
        with stream(seed, "weights"):
            model, sliced = self._traced.fresh(widths, selection)
        if sliced and seed == self._plan.seed:
            self._say(
                f"{len(sliced)} parameters hold a slice of what the model's code draws at full size: "
                f"{', '.join(sliced[:3])}{', …' if len(sliced) > 3 else ''}"
            )
        return model

    def _fresh_reference(self, seed: int) -> nn.Module:
        return self._fresh(self._traced.graph.sizes, seed)

    def _accuracies(self, model: nn.Module) -> tuple[float, ...]:
        """Return the accuracy of a network as it is; nothing without data."""
        trainer = self._trainer
        if trainer is None:
            return ()
        batch_size = self._plan.recipe.batch_size
        return (evaluate(model, trainer.measuring, batch_size, trainer.device).accuracy,)

    @property
    def _seeds(self) -> range:
        return range(self._plan.seed, self._plan.seed + self._plan.seeds)


def _widths(pruned: Pruned) -> dict[str, int]:
    return {name: len(kept) for name, kept in pruned.selection.items()}


def _provenance(plan: Plan, conditions: Mapping[str, Any] | None) -> dict[str, Any]:
    return {
        "method": plan.method,
        **({"options": dict(plan.options)} if plan.options else {}),
        "allocation": "preset" if plan.preset else plan.allocation_name,
        "target": ", ".join(map(str, plan.targets)) or plan.label,
        **({"steps": plan.steps, "recover": plan.recover} if plan.steps > 1 else {}),
        **({"recalibrate": True} if plan.recalibrate else {}),
        "budget": plan.budget,
        "seed": plan.seed,
        "seeds": plan.seeds,
        **(conditions or {}),
    }


def write_architecture(architecture: Architecture, path: Path) -> Path:
    """Write the file, unless the very same network stands there already: its date stays the first one.

    What is known of its latency may be news all the same.
    """
    before = Architecture.read(path) if path.exists() else None
    latency = architecture.provenance.get("latency")
    if before is None or before.key != architecture.key or before.provenance.get("latency") != latency:
        architecture.write(path)
    return path
