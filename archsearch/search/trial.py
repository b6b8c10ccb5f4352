"""What widths are worth: the objectives of a search. None of them looks at the test set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from archsearch import files
from archsearch.errors import IntegrityError, UsageError
from archsearch.rebuild import Traced
from archsearch.recipe import BUDGETS, Recipe
from archsearch.trainer import Trained, Trainer
from archsearch.training.determinism import derive_seed

OBJECTIVES = ("proxy", "short", "full")


@dataclass(frozen=True)
class Validating(Trainer):
    """A trainer that measures on the validation images and leaves the test set alone.

    Its trainings are those of ``Trainer``: what a search has trained is measured on the test set only if it
    is trained, that is found, by one of these later.
    """

    def _test_accuracy(self, model: nn.Module, recipe: Recipe, directory: Path) -> float:
        return validation_accuracy(directory)


def validating(trainer: Trainer) -> Validating:
    """Return a trainer's blind twin, which says nothing of single trainings.

    Raises:
        UsageError: If there are no validation images.
    """
    if not len(trainer.data.validation):
        raise UsageError(
            f"{trainer.data.name} has no validation images, which a search chooses on: take another data set"
        )
    return Validating(
        trainer.data,
        trainer.device,
        trainer.store,
        callbacks=trainer.callbacks,
        checkpoint_every_s=trainer.checkpoint_every_s,
    )


def validation_accuracy(directory: Path | None) -> float:
    """Return the validation accuracy in percent of the last epoch of a finished training."""
    if directory is None:
        raise UsageError("this training was not kept")
    return float(files.read_json(directory / "result.json", IntegrityError)["last_accuracy"])


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
        return trainer.train(label, fresh(self.traced, widths, seed), self._recipe(widths), seed)

    def shortened(self, share: float) -> Scratch:
        """Return the same with a share of the epochs."""
        return replace(self, share=share)

    def _recipe(self, widths: Mapping[str, int]) -> Recipe:
        cost = self.traced.cost
        counts = [c.of_training(self.published_cost) for c in (cost.reference, cost.of(widths))]
        recipe = BUDGETS[self.budget].recipe(self.recipe, *counts)
        return recipe if self.share == 1 else recipe.with_(epochs=max(1, round(self.share * recipe.epochs)))


def fresh(traced: Traced, widths: Mapping[str, int], seed: int) -> nn.Module:
    """Return a network with the fresh weights that belong to a seed, as everywhere in archsearch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "weights"))
        return traced.fresh(widths)[0]
