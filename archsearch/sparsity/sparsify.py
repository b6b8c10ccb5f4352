"""The verb ``sparsify``: train the reference, mask it, and compare what the masks are worth."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from archsearch import files
from archsearch.cost import Cost
from archsearch.errors import UsageError
from archsearch.rebuild import Traced, load_weights
from archsearch.recipe import BUDGETS, Recipe
from archsearch.results import Arm, Record
from archsearch.sparsity.criteria import CRITERIA, shuffled
from archsearch.sparsity.initialisation import initialise
from archsearch.sparsity.masks import Masks
from archsearch.sparsity.rule import Rule
from archsearch.sparsity.runs import Runs
from archsearch.sparsity.usage import masked_cost, output_layer, uses
from archsearch.tensor_files import write_tensors
from archsearch.trainer import Say, Trained, Trainer, is_main, mean_arm
from archsearch.training.determinism import derive_seed


@dataclass(frozen=True)
class SparsityPlan:
    """What to mask, and how to compare it.

    Attributes:
        keep: Share of the weights that stays, in ``(0, 1]``.
        rule: How the masks are chosen.
        steps: In how many steps, each taking the same share of what is left.
        recover: Epochs of training between two steps, where the weights are trained ones.
        images: Training images that a criterion looks at.
        budget: How the masked network is trained.
        budget_cap: Most epochs, in multiples of the recipe's.
        published_cost: Whether Scratch-B counts FLOPs as Liu et al. publish them, instead of MACs.
        recipe: How the reference is trained; the budget stretches it.
        finetune: The budget of the fine-tuned arm.
        seeds: How many times each arm is trained.
        seed: The first seed.
    """

    keep: float
    rule: Rule = field(default_factory=Rule)
    steps: int = 1
    recover: int = 1
    images: int = 128
    budget: str = "scratch-b"
    budget_cap: float | None = None
    published_cost: bool = False
    recipe: Recipe = field(default_factory=Recipe)
    finetune: str = "finetune"
    seeds: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise UsageError(f"--keep {self.keep:g}: must be a share in (0, 1]")
        for name in ("steps", "recover", "images", "seeds"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least 1")
        replace(BUDGETS[self.budget], cap=self.budget_cap)  # checks the cap
        if not (BUDGETS[self.finetune].inherits and BUDGETS[self.finetune].epochs_divisor):
            raise UsageError(f"--finetune {self.finetune}: does not fine-tune; give finetune")
        if BUDGETS[self.budget].inherits and self.budget != "none" and not CRITERIA[self.rule.method].trained:
            raise UsageError(
                f"--method {self.rule.method} masks fresh weights, and there is nothing to fine-tune: "
                "give --budget scratch-e or scratch-b"
            )


@dataclass(frozen=True)
class Sparsified:
    """What ``sparsify`` gives.

    Attributes:
        masks: Of the first seed.
        model: Its network, trained if anything was trained.
        record: Conditions and arms of the comparison.
        files: What was written.
    """

    masks: Masks
    model: nn.Module
    record: Record
    files: Sequence[Path]


def sparsify(
    traced: Traced,
    plan: SparsityPlan,
    trainer: Trainer | None,
    *,
    weights: str | None = None,
    trained: bool = False,
    out: Path | None = None,
    conditions: Mapping[str, Any] | None = None,
    say: Say = lambda line: None,
) -> Sparsified:
    """Choose single weights, train what stays, and compare it with chance and with the reference.

    The arms are the reference, random masks with as many weights in each layer, the masked network with the
    weights on which the masks were chosen (fine-tuned, or trained from its initialisation), and the masked
    network with fresh weights.

    Args:
        traced: The reference network.
        plan: What to mask.
        trainer: Trains the arms; ``None`` with a budget of ``none``.
        weights: File with the reference's weights, which is then not trained.
        trained: Whether the reference's weights, as they are, are trained ones.
        out: Directory of the results; ``None`` writes nothing.
        conditions: What else to record about the run.
        say: Takes lines for the user.

    Raises:
        UsageError: If there is no data to train with, or the share leaves too little.
    """
    if trainer is None and plan.budget != "none":
        raise UsageError(f"--budget {plan.budget} trains networks: give --data, or --budget none")
    comparison = _Comparison(traced, plan, trainer, say)
    record_of = {**_provenance(plan), **(conditions or {})}
    architecture = traced.architecture(traced.graph.sizes, record_of)
    if out is not None:
        files.probe(out, 8 * traced.cost.reference.params)
    references = comparison.references(weights, trained)
    starts = comparison.masked(references[1])
    arms, model = comparison.arms(starts)
    record = Record(record_of, [references[0], *arms])
    masks = starts[0].masks
    written: list[Path] = []
    if out is not None and is_main():
        architecture.write(out / "architecture.yaml")
        masks.write(out / "masks.safetensors")
        write_tensors(out / "weights.safetensors", model.state_dict())
        names = ("architecture.yaml", "masks.safetensors", "weights.safetensors")
        written = [*(out / name for name in names), *record.write(out)]
    return Sparsified(masks, model, record, written)


@dataclass(frozen=True)
class _Start:
    """A network on which masks were chosen, with the masks applied, and what it costs so."""

    seed: int
    model: nn.Module
    masks: Masks
    cost: Cost


class _Comparison:
    """One run of ``sparsify``."""

    def __init__(self, traced: Traced, plan: SparsityPlan, trainer: Trainer | None, say: Say) -> None:
        self._traced, self._plan, self._say = traced, plan, say
        self._dense = traced.cost.reference
        self._uses = uses(traced.model, traced.example)
        seeds = range(plan.seed, plan.seed + plan.seeds)
        self._runs = Runs(traced, trainer, plan.recipe, seeds, say)

    def references(self, weights: str | None, trained: bool) -> tuple[Arm, list[nn.Module]]:
        """Return the arm of the reference and its network of each seed, the same where weights are given."""
        seeds = self._runs.seeds
        model = copy.deepcopy(self._traced.model)
        if weights is not None:
            load_weights(model, weights)
        if weights is not None or trained or self._runs.trainer is None:
            if weights is None and not trained:
                self._say("the reference has fresh random weights: nothing was trained (--budget none)")
            arm = Arm("reference", "reference", "reference", self._dense.macs, self._dense.params)
            return replace(arm, accuracies=self._runs.accuracy(model)), [model] * len(seeds)
        results = [self._runs.train("reference", self._runs.fresh(seed), seed) for seed in seeds]
        arm = mean_arm("reference", "reference", "reference", [self._dense], results)
        return arm, [result.model for result in results]

    def masked(self, references: Sequence[nn.Module]) -> list[_Start]:
        """Choose the masks of each seed."""
        starts = []
        for seed, reference in zip(self._runs.seeds, references, strict=True):
            trained = CRITERIA[self._plan.rule.method].trained
            model, masks = self._mask(copy.deepcopy(reference) if trained else self._runs.fresh(seed), seed)
            starts.append(_Start(seed, model, masks, masked_cost(self._dense, self._uses, masks)))
        cost, masks = starts[0].cost, starts[0].masks
        self._say(
            f"{self._label}: keeps {masks.kept:,} of {masks.total:,} weights ({masks.share:.4f}), "
            f"{cost.macs / self._dense.macs:.4f} of the MACs ({cost.macs:,})"
        )
        if masks.lifted:
            self._say(
                f"one threshold would have emptied {len(masks.lifted)} layers, whose best weight stays: "
                f"{', '.join(masks.lifted[:3])}{', …' if len(masks.lifted) > 3 else ''}; "
                "--allocation layer shares out evenly"
            )
        return starts

    def _mask(self, model: nn.Module, seed: int) -> tuple[nn.Module, Masks]:
        """Return the network as its masks leave it, recovered between the steps, and the masks."""
        plan, masks = self._plan, Masks({})
        for step in range(1, plan.steps + 1):
            masks = plan.rule.masks(
                model,
                plan.keep ** (step / plan.steps),
                rounds=step,
                output=output_layer(self._uses),
                within=masks,
                batch=self._runs.batch(plan.images, seed),
                seed=seed,
            )
            masks.apply(model)
            if step < plan.steps and CRITERIA[plan.rule.method].trained and self._runs.trainer is not None:
                recipe = BUDGETS[plan.finetune].recipe(plan.recipe).with_(epochs=plan.recover)
                name = f"{self._label}, recovery {step} of {plan.steps - 1}"
                model = self._runs.train(name, model, seed, recipe=recipe, masks=masks).model
        return model, masks

    def arms(self, starts: Sequence[_Start]) -> tuple[list[Arm], nn.Module]:
        """Train all arms beside the reference; return them, and the network of the last arm's first seed."""
        plan, label, method = self._plan, self._label, self._plan.rule.method
        costs = [start.cost for start in starts]
        if plan.budget == "none":
            arm = Arm(f"{label}, not trained", label, "none", costs[0].macs, costs[0].params)
            return [replace(arm, accuracies=self._runs.accuracy(starts[0].model))], starts[0].model
        arms: list[Arm] = []
        scratch = not BUDGETS[plan.budget].inherits
        if scratch and method != "random":
            chance = [replace(start, masks=shuffled(start.masks, self._chance(start))) for start in starts]
            results = [self._scratch("random mask", start) for start in chance]
            arms.append(mean_arm(f"random mask, {plan.budget}", "random", plan.budget, costs, results))
        if CRITERIA[method].trained:
            budget = plan.finetune if scratch else plan.budget
            name = f"{label}, {budget}"
            recipes = [BUDGETS[budget].recipe(plan.recipe)] * len(starts)
        else:
            budget, name = plan.budget, f"{label}, its initialisation, {plan.budget}"
            recipes = [self._stretched(start.cost) for start in starts]
        results = [
            self._runs.train(name, start.model, start.seed, recipe=recipe, masks=start.masks)
            for start, recipe in zip(starts, recipes, strict=True)
        ]
        arms.append(mean_arm(name, label, budget, costs, results))
        if scratch:
            results = [self._scratch(label, start) for start in starts]
            arms.append(mean_arm(f"{label}, {plan.budget}", label, plan.budget, costs, results))
        return arms, results[0].model

    def _scratch(self, label: str, start: _Start) -> Trained:
        """Train a masked network from fresh weights."""
        sizes = self._traced.graph.sizes
        model = self._runs.drawn(start.seed, lambda: initialise(self._traced.fresh(sizes)[0], start.masks))
        name, recipe = f"{label}, {self._plan.budget}", self._stretched(start.cost)
        return self._runs.train(name, model, start.seed, recipe=recipe, masks=start.masks)

    def _stretched(self, cost: Cost) -> Recipe:
        """Return the recipe of the budget for a masked network of some cost."""
        plan = self._plan
        costs = [each.of_training(plan.published_cost) for each in (self._dense, cost)]
        return replace(BUDGETS[plan.budget], cap=plan.budget_cap).recipe(plan.recipe, *costs)

    @property
    def _label(self) -> str:
        return self._plan.rule.method

    @staticmethod
    def _chance(start: _Start) -> int:
        return derive_seed(start.seed, "random mask")


def _provenance(plan: SparsityPlan) -> dict[str, Any]:
    return {
        "method": plan.rule.method,
        "allocation": plan.rule.allocation,
        "scope": plan.rule.scope,
        "output rate": plan.rule.output_rate,
        "keep": plan.keep,
        **({"steps": plan.steps, "recover": plan.recover} if plan.steps > 1 else {}),
        "budget": plan.budget,
        "seed": plan.seed,
        "seeds": plan.seeds,
    }
