"""Training the networks of a search from scratch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from archsearch.errors import UsageError
from archsearch.rebuild import Traced
from archsearch.recipe import BUDGETS, Recipe
from archsearch.trainer import Trained, Trainer
from archsearch.training.determinism import stream


@dataclass(frozen=True)
class Scratch:
    """Trains networks of given widths from scratch.

    Attributes:
        traced: The reference.
        recipe: How the reference is trained.
        budget: Name of the budget, which stretches the recipe.
        share: Of the epochs that are trained; the schedule is that of the shorter training.
        published_cost: Whether Scratch-B counts FLOPs as Liu et al. publish them.
    """

    traced: Traced
    recipe: Recipe
    budget: str
    share: float = 1.0
    published_cost: bool = False

    def __post_init__(self) -> None:
        if BUDGETS[self.budget].inherits:
            raise UsageError(f"--budget {self.budget}: a search trains from scratch: scratch-e or scratch-b")

    def __call__(self, trainer: Trainer, label: str, widths: Mapping[str, int], seed: int) -> Trained:
        """Train a fresh network, or find that it was trained before."""
        return trainer.train(label, fresh(self.traced, widths, seed), self.recipe_of(widths), seed)

    def shortened(self, share: float) -> Scratch:
        """Return the same with a share of the epochs."""
        return replace(self, share=share)

    def recipe_of(self, widths: Mapping[str, int]) -> Recipe:
        """Return how a network of these widths is trained."""
        cost = self.traced.cost
        counts = [c.of_training(self.published_cost) for c in (cost.reference, cost.of(widths))]
        recipe = BUDGETS[self.budget].recipe(self.recipe, *counts)
        return recipe if self.share == 1 else recipe.with_(epochs=max(1, round(self.share * recipe.epochs)))


def fresh(traced: Traced, widths: Mapping[str, int], seed: int) -> nn.Module:
    """Return a network with the fresh weights that belong to a seed, as everywhere in archsearch."""
    with stream(seed, "weights"):
        return traced.fresh(widths)[0]
