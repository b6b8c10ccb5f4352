"""Trainings that happen once: each lives in a directory named by the hash of all that decides its outcome."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from archsearch import files
from archsearch.cost import Cost
from archsearch.data import DataSource
from archsearch.errors import DivergedError, IntegrityError, InUseError, UsageError
from archsearch.rebuild import Traced
from archsearch.recipe import Recipe
from archsearch.results import Arm
from archsearch.training.callbacks import Callback, MetricsFile
from archsearch.training.checkpoint import restore_module
from archsearch.training.directory import TrainingDirectory, describe
from archsearch.training.evaluation import Split, evaluate, resolve_device
from archsearch.training.loop import TrainResult, train

Say = Callable[[str], None]

WAIT_S = 1.0
"""Pause before a training that another process has is asked for again."""


@dataclass(frozen=True)
class Trainer:
    """How networks are trained and where their trainings are kept.

    Attributes:
        data: Train, validation and test images.
        device: As for ``training.train``.
        store: Directory of all trainings.
        say: Takes lines for the user.
        callbacks: Makes a training's callbacks from its label and directory.
        checkpoint_every_s: Seconds between checkpoints inside an epoch.
        blind: Whether the test set stays closed: accuracies are then those of the validation images after
            the last epoch. The trainings are the same, so that a trainer that sees finds them again.
        waits: Whether a training that another process is at is waited for, or an error.
    """

    data: DataSource
    device: str
    store: Path
    say: Say = lambda line: None
    callbacks: Callable[[str, Path], Sequence[Callback]] = lambda label, directory: ()
    checkpoint_every_s: float = 300.0
    blind: bool = False
    waits: bool = False

    def blinded(self) -> Trainer:
        """Return the same trainer with the test set closed; of single trainings it says nothing.

        Raises:
            UsageError: If there are no validation images.
        """
        if not len(self.data.validation):
            raise UsageError(
                f"{self.data.name} has no validation images, which a search chooses on: take another data set"
            )
        return replace(self, blind=True, say=lambda line: None)

    @property
    def measuring(self) -> Split:
        """The images that accuracies are of: the test set, or the validation images of a blind trainer."""
        return self.data.validation if self.blind else self.data.test

    def train(
        self,
        label: str,
        model: nn.Module,
        recipe: Recipe,
        seed: int,
        *,
        callbacks: Sequence[Callback] = (),
        identity: Mapping[str, Any] | None = None,
        start_step: int = 0,
    ) -> Trained:
        """Train a network, or find that it was trained before, and measure it on the test set.

        A blind trainer measures on the validation images.

        Args:
            label: What the user calls it.
            model: Is trained in place.
            recipe: How.
            seed: Of the order of the images and the like.
            callbacks: Called before those that only keep records.
            identity: What these callbacks do to the training, as plain values; part of its address.
            start_step: As for ``training.train``.

        Raises:
            DivergedError: If the loss or a weight is not finite; says whose.
        """
        facts = describe(model, recipe, seed, resolve_device(self.device), processes())
        identity = {"data": self.data.fingerprint, **(identity or {})}
        facts |= {"start step": start_step} if start_step else {}
        directory = self.store / "trainings" / _key({**facts, **identity})
        seen = [*callbacks, MetricsFile(directory / "metrics.csv"), *self.callbacks(label, directory)]
        result = self._when_free(
            lambda: train(
                model,
                self.data.train,
                self.data.validation,
                recipe,
                seed=seed,
                directory=directory,
                device=self.device,
                callbacks=seen,
                checkpoint_every_s=self.checkpoint_every_s,
                identity=identity,
                start_step=start_step,
            ),
            label,
        )
        return self._measured(label, result, recipe, directory)

    def kept(self, label: str, model: nn.Module, recipe: Recipe, directory: Path) -> Trained:
        """Return a network that was trained somewhere, such as on another device, read from its directory.

        Args:
            label: What the arm is called in progress lines.
            model: A fresh one, which gets the weights.
            recipe: That it was trained by.
            directory: Of the training.

        Raises:
            IntegrityError: If the training is not finished, or is of another network.
        """
        found = TrainingDirectory(directory, is_main=False).result()
        if found is None:
            raise IntegrityError(f"{directory}: the training is not finished: the same command goes on")
        facts, weights = found
        restore_module(model, weights, directory)
        model.to(resolve_device(self.device))
        return self._measured(label, TrainResult(model, **facts, reused=True), recipe, directory)

    def _measured(self, label: str, result: TrainResult, recipe: Recipe, directory: Path) -> Trained:
        if self.blind:
            accuracy, images = result.last_accuracy, "validation images"
        else:
            accuracy, images = self._test_accuracy(result.model, recipe, directory), "test set"
        if accuracy is None:
            raise UsageError(f"{self.data.name} has no validation images, which a blind trainer measures on")
        how = "trained before, read from" if result.reused else "kept in"
        self.say(
            f"{label}: {accuracy:.2f} % on the {images} after {result.epochs} epochs ({how} {directory})"
        )
        return Trained(result.model, accuracy, result.epochs, result.seconds, directory)

    def _when_free(self, train: Callable[[], TrainResult], label: str) -> TrainResult:
        """Train; where another process is at the same training, wait for its end if that is wished."""
        told = False
        while True:
            try:
                return train()
            except DivergedError as error:
                raise DivergedError(f"{label}: {error}") from error
            except InUseError as error:  # raised before anything has begun
                if not self.waits:
                    raise
                if not told:
                    self.say(f"{label}: waits: {error}")
                told = True
                time.sleep(WAIT_S)

    def steps_per_epoch(self, recipe: Recipe) -> int:
        """Return how many steps an epoch of a training takes."""
        joint = processes()
        return self.data.train.num_batches(recipe.batch_size // joint, world_size=joint)

    def calibration(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Return batches of the train split as they are, always the same, for methods that look at images."""
        return self.data.train.batches(64)

    def _test_accuracy(self, model: nn.Module, recipe: Recipe, directory: Path) -> float:
        """Return the accuracy on the test set, which is read once for each training, at its end."""
        path = directory / "test.json"
        if path.exists():
            return float(files.read_json(path, IntegrityError)["accuracy"])
        measured = evaluate(model, self.data.test, recipe.batch_size, self.device)
        if is_main():
            files.write_json(
                path, {"accuracy": measured.accuracy, "loss": measured.loss, "images": measured.images}
            )
        return measured.accuracy


@dataclass(frozen=True)
class Trained:
    """A trained network with its accuracy in percent (a blind trainer's: of the validation images)."""

    model: nn.Module
    accuracy: float
    epochs: int
    seconds: float
    directory: Path | None = None


def arm_of(name: str, widths: str, budget: str, cost: Cost, results: Sequence[Trained]) -> Arm:
    """Return the arm of several trainings of one network."""
    return mean_arm(name, widths, budget, [cost], results)


def mean_arm(name: str, widths: str, budget: str, costs: Sequence[Cost], results: Sequence[Trained]) -> Arm:
    """Return the arm of several trainings of networks that cost nearly the same: the mean of their costs."""
    return Arm(
        name,
        widths,
        budget,
        round(sum(cost.macs for cost in costs) / len(costs)),
        round(sum(cost.params for cost in costs) / len(costs)),
        results[0].epochs,
        tuple(result.accuracy for result in results),
        sum(result.seconds for result in results),
    )


def check_classes(traced: Traced, data: DataSource) -> None:
    """Raise UsageError if the network has fewer outputs than the data classes."""
    outputs = traced.graph.trace.output_shapes[0][-1]
    if outputs < data.num_classes:
        raise UsageError(
            f"{traced.name} has {outputs} outputs, but {data.name} has {data.num_classes} classes; "
            "give its factory an argument num_classes"
        )


def is_main() -> bool:
    """Return whether this process is the one that writes files and prints."""
    return os.environ.get("RANK", "0") == "0"


def processes() -> int:
    """Return how many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _key(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
