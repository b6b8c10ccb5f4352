"""The trainings of one study: the same initial networks as everywhere, masks held, kept in the store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from archsearch.errors import UsageError
from archsearch.rebuild import Traced
from archsearch.recipe import Recipe
from archsearch.sparsity.criteria import Batch
from archsearch.sparsity.masks import MaskedTraining, Masks
from archsearch.trainer import Say, Trained, Trainer
from archsearch.training.callbacks import Callback
from archsearch.training.determinism import derive_seed, stream
from archsearch.training.evaluation import evaluate


@dataclass(frozen=True)
class Runs:
    """Networks of several seeds, trained under one recipe.

    Attributes:
        traced: The reference network.
        trainer: Trains; ``None`` without data.
        recipe: How the reference is trained.
        seeds: One network each.
        say: Takes lines for the user.
    """

    traced: Traced
    trainer: Trainer | None
    recipe: Recipe
    seeds: Sequence[int]
    say: Say = lambda line: None

    def fresh(self, seed: int) -> nn.Module:
        """Return the reference with fresh weights, those that ``find`` trains."""
        with stream(seed, "weights"):
            return self.traced.fresh(self.traced.graph.sizes)[0]

    def drawn(self, seed: int, draw: Callable[[], nn.Module]) -> nn.Module:
        """Return the network that ``draw`` makes from a random state that ``fresh`` does not use."""
        with stream(seed, "weights again"):
            return draw()

    def train(
        self,
        label: str,
        model: nn.Module,
        seed: int,
        *,
        recipe: Recipe | None = None,
        masks: Masks | None = None,
        callbacks: Sequence[Callback] = (),
        identity: Mapping[str, Any] | None = None,
        start_step: int = 0,
    ) -> Trained:
        """Train a network to which its masks were applied, and bring it back to the CPU.

        Raises:
            UsageError: If there is no data.
        """
        held = [] if masks is None else [MaskedTraining(masks)]
        facts = {} if masks is None else {"masks": masks.digest}
        trained = self.with_data.train(
            f"{label}, seed {seed}" if len(self.seeds) > 1 else label,
            model,
            recipe or self.recipe,
            seed,
            callbacks=[*held, *callbacks],
            identity={**facts, **(identity or {})},
            start_step=start_step,
        )
        trained.model.cpu()
        return trained

    @property
    def with_data(self) -> Trainer:
        """The trainer.

        Raises:
            UsageError: If there is none.
        """
        if self.trainer is None:
            raise UsageError("there is no data to train with: give --data")
        return self.trainer

    def accuracy(self, model: nn.Module) -> tuple[float, ...]:
        """Return the test accuracy of a network as it is; nothing without data."""
        if self.trainer is None:
            return ()
        measured = evaluate(model, self.trainer.data.test, self.recipe.batch_size, self.trainer.device)
        model.cpu()
        return (measured.accuracy,)

    def batch(self, images: int, seed: int) -> Batch | None:
        """Return shuffled training images with their labels, as they are augmented; nothing without data."""
        if self.trainer is None:
            return None
        return next(
            iter(self.trainer.data.train.batches(images, seed=derive_seed(seed, "batch"), train=True))
        )
