"""Train a network: one plain loop, whose behaviour comes in as callbacks.

Given a directory, a training can be killed at any moment: the same call goes on from the last checkpoint
and, on the CPU, ends with bit-identical weights. That rests on three things: every random number is drawn
from a generator keyed by seed, purpose and step, the data starts at any step of an epoch, and only whole
steps are saved.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from archsearch.errors import DivergedError, StorageError, UsageError
from archsearch.recipe import Recipe
from archsearch.training.accelerator import accelerated
from archsearch.training.allocator import keep_freed_memory
from archsearch.training.callbacks import Callback, Row, State
from archsearch.training.checkpoint import REMEDY, check_finite, restore_module
from archsearch.training.determinism import derive_seed, reproducible, seed_globals
from archsearch.training.directory import TrainingDirectory, describe, machine
from archsearch.training.evaluation import Evaluation, Split, Totals, evaluate, resolve_device, sum_over
from archsearch.training.learner import Learner, Penalty
from archsearch.training.signals import StopRequest, leave

__all__ = ["Evaluation", "Split", "TrainResult", "evaluate", "train"]


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a training gave.

    Attributes:
        model: The caller's network, trained; with the averaged weights if the recipe averages.
        history: One row an epoch: ``epoch`` (from 1), ``lr``, ``train_loss``, ``train_accuracy``,
            ``validation_loss``, ``validation_accuracy`` (percent), ``seconds``. Without validation images
            its two are left out.
        best_accuracy: Highest validation accuracy of all epochs, in percent; ``None`` without validation.
        last_accuracy: Validation accuracy of the last epoch, likewise.
        seconds: Time that all epochs took, with validation, in all parts of a resumed training.
        epochs: Epochs trained.
        images_per_second: Training images a second, validation included.
        reused: Whether the training was finished before and its result only read.
    """

    model: nn.Module
    history: list[Row]
    best_accuracy: float | None
    last_accuracy: float | None
    seconds: float
    epochs: int
    images_per_second: float
    reused: bool = False


def train(
    model: nn.Module,
    data_train: Split,
    data_validation: Split,
    recipe: Recipe,
    *,
    epochs: int | None = None,
    seed: int = 0,
    directory: Path | None = None,
    device: str | torch.device = "auto",
    callbacks: Sequence[Callback] = (),
    penalty: Penalty | None = None,
    checkpoint_every_s: float = 300.0,
    identity: Mapping[str, Any] | None = None,
    start_step: int = 0,
) -> TrainResult:
    """Train a network in place and return it with its history. The test set is the caller's business.

    Under ``accelerate launch`` or ``torchrun`` all processes call this together and share each step's batch.

    Args:
        model: Is moved to the device and trained in place.
        data_train: What the weights are fitted to.
        data_validation: Measured after each epoch; may be empty.
        recipe: How to train.
        epochs: Instead of the recipe's.
        seed: Decides the order of the images, their augmentation and dropout, not the initial weights.
        directory: Keeps checkpoints and the result. The same call again goes on, or returns the result.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or ``"auto"`` for a GPU where there is one.
        callbacks: Called in order; see ``Callback``.
        penalty: A term of the loss beside the cross-entropy, a function of the weights.
        checkpoint_every_s: Seconds between checkpoints inside an epoch; its end always writes one.
        identity: What else decides the result, such as the data's fingerprint, as plain values; a directory
            made with another one is refused.
        start_step: Step at which to start: schedule and order of the images are those of the full training
            from there, the network's weights are taken for those at that step, and the optimiser starts
            afresh, without momentum.

    Raises:
        UsageError: If the device is absent, the data empty, the precision impossible on the device, or there
            is no such step to start at.
        IntegrityError: If the directory was made by another training, or all its checkpoints are damaged.
        StorageError: If another process trains in the directory.
        ResourceError: If the directory cannot be written or is too small.
        DivergedError: If the loss or a weight is not finite.
        PreemptedError: If SIGTERM or SIGHUP came; a checkpoint was written.
        KeyboardInterrupt: If SIGINT came; a checkpoint was written.
    """
    recipe = recipe if epochs is None else recipe.with_(epochs=epochs)
    place = resolve_device(device)
    if place.type == "cpu":
        keep_freed_memory()
    with ExitStack() as stack:
        stack.enter_context(reproducible(place))
        accelerator = stack.enter_context(accelerated(place, recipe.precision))
        per_process = _share(recipe.batch_size, accelerator.num_processes)
        batches = data_train.num_batches(per_process, world_size=accelerator.num_processes)
        if batches == 0:
            raise UsageError("training: the training split holds no image; give one with data")
        if not 0 <= start_step < recipe.epochs * batches:
            raise UsageError(
                f"training: cannot start at step {start_step}; it has the steps 0 to "
                f"{recipe.epochs * batches - 1}, {batches} an epoch"
            )
        state = State(
            model, recipe.epochs, batches, accelerator.is_main_process, *divmod(start_step, batches)
        )

        folder = None
        if directory is not None:
            folder = TrainingDirectory(directory, is_main=state.is_main)
            facts = describe(model, recipe, seed, accelerator.device, accelerator.num_processes)
            facts |= {"training images": len(data_train), "validation images": len(data_validation)}
            facts |= {"start step": start_step} if start_step else {}
            facts |= identity or {}
            folder.claim(stack, facts, machine(accelerator.device), _checkpoints_bytes(model))
            if (finished := folder.result()) is not None:
                restore_module(model, finished[1], directory)
                return TrainResult(model.to(accelerator.device), **finished[0], reused=True)

        learner = Learner(model, recipe, accelerator, penalty)
        stack.callback(learner.release)
        # Without a directory there is nothing to save, and signals do what they always do.
        stop = StopRequest() if folder is None else stack.enter_context(StopRequest())
        loop = _Loop(learner, state, recipe, seed, accelerator, folder, stop, callbacks, checkpoint_every_s)
        for callback in callbacks:
            stack.callback(callback.on_end, state)
            callback.on_start(state)
        while state.epoch < recipe.epochs:
            loop.train_epoch(data_train, per_process)
            loop.validate(data_validation, per_process)
        return loop.finish()


class _Loop:
    """The moving parts of one training; ``state`` says where it stands."""

    def __init__(
        self,
        learner: Learner,
        state: State,
        recipe: Recipe,
        seed: int,
        accelerator: Accelerator,
        folder: TrainingDirectory | None,
        stop: StopRequest,
        callbacks: Sequence[Callback],
        checkpoint_every_s: float,
    ) -> None:
        self._learner, self._state, self._recipe, self._seed = learner, state, recipe, seed
        self._accelerator, self._folder, self._stop = accelerator, folder, stop
        self._callbacks, self._checkpoint_every_s = callbacks, checkpoint_every_s
        self._resume()
        self._counted_at = self._saved_at = time.monotonic()

    def train_epoch(self, data: Split, batch_size: int) -> None:
        """Take the steps of the epoch that are left."""
        state = self._state
        if state.batch == state.batches:
            return
        stream = data.batches(
            batch_size,
            seed=derive_seed(self._seed, "data"),
            epoch=state.epoch,
            train=True,
            start=state.batch,
            rank=self._accelerator.process_index,
            world_size=self._accelerator.num_processes,
            device=self._accelerator.device,
            channels_last=self._recipe.channels_last,
        )
        hook = self._after_backward if self._callbacks else None
        for images, labels in stream:
            # So dropout needs no generator's state in a checkpoint, of which each process would have its own.
            seed_globals(derive_seed(self._seed, "step", state.step, self._accelerator.process_index))
            state.lr = self._recipe.learning_rate(state.epoch, state.epochs, state.batch / state.batches)
            *totals, votes = self._agree(self._learner.step(images, labels, state.lr, state.step, hook))
            self._check(totals[0])
            state.count(*totals)
            for callback in self._callbacks:
                callback.on_step(state)
            if votes:
                self._leave()
            if time.monotonic() - self._saved_at >= self._checkpoint_every_s:
                self._save()

    def validate(self, data: Split, batch_size: int) -> None:
        """Measure the network, write the epoch's row and go on to the next epoch."""
        state = self._state
        sums = sum_over(
            self._learner.result,
            data,
            batch_size,
            self._accelerator.device,
            rank=self._accelerator.process_index,
            world_size=self._accelerator.num_processes,
            stopped=lambda: self._stop,
        )
        *totals, votes = self._agree(sums)
        if votes:
            self._leave()
        self._check(totals[0])
        check_finite(self._learner.tensors())
        self._count_time()
        trained = state.totals.mean()
        row: Row = {
            "epoch": state.epoch + 1,
            "lr": self._recipe.learning_rate(state.epoch, state.epochs),
            "train_loss": trained.loss,
            "train_accuracy": trained.accuracy,
            "seconds": state.seconds - sum(row["seconds"] for row in state.history),
        }
        if totals[2]:
            validated = Totals(*totals).mean()
            row |= {"validation_loss": validated.loss, "validation_accuracy": validated.accuracy}
        state.history.append(row)
        state.epoch, state.batch, state.totals = state.epoch + 1, 0, Totals()
        self._save()
        for callback in self._callbacks:
            callback.on_epoch_end(state)

    def finish(self) -> TrainResult:
        """Return the result; with a directory, write it there first."""
        state, model = self._state, self._learner.adopt_average()
        accuracies = [row["validation_accuracy"] for row in state.history if "validation_accuracy" in row]
        facts: dict[str, Any] = {
            "history": state.history,
            "best_accuracy": max(accuracies, default=None),
            "last_accuracy": accuracies[-1] if accuracies else None,
            "seconds": state.seconds,
            "epochs": state.epochs,
            "images_per_second": state.images / state.seconds,
        }
        if self._folder is not None:
            self._folder.finish(facts, model.state_dict())
        return TrainResult(model, **facts)

    def _resume(self) -> None:
        found = None if self._folder is None else self._folder.checkpoints.load()
        if self._folder is not None and found is not None:
            tensors, position = found
            self._learner.restore(tensors, position["scaler"], self._folder.path)
            self._state.restore(position)
        here = torch.tensor(self._state.position_number, device=self._accelerator.device)
        if (
            int(self._accelerator.reduce(here, "sum"))
            != self._state.position_number * self._accelerator.num_processes
        ):
            raise StorageError(
                "training: the processes see different checkpoints; give a directory that all share"
            )

    def _agree(self, sums: Tensor) -> list[float]:
        """Add up sums over all processes and, as one more number, how many of them are asked to stop."""
        vote = sums.new_tensor([float(bool(self._stop))])
        agreed: list[float] = self._accelerator.reduce(torch.cat([sums, vote]), "sum").tolist()
        return agreed

    def _after_backward(self) -> None:
        for callback in self._callbacks:
            callback.after_backward(self._state)

    def _check(self, loss: float) -> None:
        if not math.isfinite(loss):
            state = self._state
            where = f"epoch {state.epoch + 1}, step {state.batch + 1} of {state.batches}, at lr {state.lr:g}"
            raise DivergedError(f"training diverged: the loss is {loss} in {where}; {REMEDY}")

    def _count_time(self) -> None:
        now = time.monotonic()
        self._state.seconds += now - self._counted_at
        self._counted_at = now

    def _save(self) -> None:
        self._count_time()
        state, self._saved_at = self._state, time.monotonic()
        if self._folder is not None and state.is_main:
            position = {**state.position(), "scaler": self._learner.scaler_state()}
            self._folder.checkpoints.save(state.position_number, self._learner.tensors(), position)

    def _leave(self) -> NoReturn:
        self._save()
        state = self._state
        leave(
            self._stop.signum,
            f"training stopped by a signal in epoch {state.epoch + 1}, after step {state.batch} of "
            f"{state.batches}; a checkpoint was written, and the same command goes on from there",
        )


def _share(batch_size: int, processes: int) -> int:
    if batch_size % processes:
        raise UsageError(
            f"recipe: batch_size {batch_size} is shared by {processes} processes; give a multiple"
        )
    return batch_size // processes


def _checkpoints_bytes(model: nn.Module) -> int:
    """Return what three checkpoints take: weights, two moments and an average each."""
    weights: int = sum(tensor.nbytes for tensor in model.state_dict().values())
    return 3 * 4 * weights
