"""What joins a training from outside, and the callbacks that keep records of it."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from archsearch import files
from archsearch.errors import UsageError
from archsearch.training.evaluation import Totals

Row = dict[str, float]


@dataclasses.dataclass
class State:
    """Where a training stands. Callbacks read it; only the loop writes it.

    Attributes:
        model: The network as the caller gave it, not wrapped.
        epochs: Epochs in all.
        batches: Steps of an epoch.
        is_main: Whether this process is the one that writes files and prints.
        epoch: Number of the running epoch, from 0.
        batch: Steps of it that were taken.
        lr: Learning rate of the last step.
        totals: Sums over the images of this epoch.
        history: One row for each finished epoch.
        seconds: Time spent up to the last checkpoint or end of an epoch, resumed parts included.
        images: Images trained on, resumed parts included.
    """

    model: nn.Module
    epochs: int
    batches: int
    is_main: bool = True
    epoch: int = 0
    batch: int = 0
    lr: float = 0.0
    totals: Totals = dataclasses.field(default_factory=Totals)
    history: list[Row] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    images: int = 0

    @property
    def step(self) -> int:
        """Steps taken since the start of the training."""
        return self.epoch * self.batches + self.batch

    @property
    def position_number(self) -> int:
        """A number for each place to stop at; before and after a validation are two places."""
        return self.epoch * (self.batches + 1) + self.batch

    def count(self, loss: float, correct: float, images: float) -> None:
        """Count one more step."""
        self.totals.add(loss, correct, images)
        self.images += int(images)
        self.batch += 1

    def position(self) -> dict[str, Any]:
        """Return all that changes, as plain values."""
        names = ("epoch", "batch", "lr", "history", "seconds", "images")
        return {name: getattr(self, name) for name in names} | {"totals": dataclasses.asdict(self.totals)}

    def restore(self, position: Mapping[str, Any]) -> None:
        """Take back what ``position`` gave."""
        for name in self.position():
            setattr(self, name, position[name])
        self.totals = Totals(**position["totals"])


class Callback:
    """What the training loop calls; every method may be left as it is.

    All processes of a data-parallel training call their callbacks: whoever writes asks ``state.is_main``.
    """

    def on_start(self, state: State) -> None:
        """Called once before the first step, after a checkpoint, if any, was read."""

    def after_backward(self, state: State) -> None:
        """Called in every step when the gradients are complete, before they are clipped and used.

        The place to change ``parameter.grad``; gradients are true ones, whatever the precision.
        """

    def on_step(self, state: State) -> None:
        """Called after every step, the state already counting it."""

    def on_epoch_end(self, state: State) -> None:
        """Called after an epoch's validation and checkpoint; ``state.history[-1]`` is its row."""

    def on_end(self, state: State) -> None:
        """Called once after the last step, also when an error or a signal ends the training."""


class MetricsFile(Callback):
    """Keep the history in a file: CSV if its name ends so, else JSON lines.

    The file is replaced as a whole after every epoch: a resumed training neither repeats nor loses a row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_start(self, state: State) -> None:
        """Write the rows of a resumed training."""
        if state.history:
            self.on_epoch_end(state)

    def on_epoch_end(self, state: State) -> None:
        """Write all rows."""
        if not state.is_main:
            return
        text = io.StringIO()
        if self.path.suffix == ".csv":
            table = csv.DictWriter(text, fieldnames=list(state.history[0]), lineterminator="\n")
            table.writeheader()
            table.writerows(state.history)
        else:
            text.writelines(json.dumps(row) + "\n" for row in state.history)
        files.write_text(self.path, text.getvalue())


class TensorBoard(Callback):
    """Write the history for TensorBoard.

    Raises:
        UsageError: If TensorBoard is not installed.
    """

    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UsageError(
                "tensorboard is not installed: pip install 'archsearch[tensorboard]', or leave it out"
            ) from None
        self._open = lambda first: SummaryWriter(str(directory), purge_step=first)
        self._writer: Any = None

    def on_start(self, state: State) -> None:
        """Open the record; whatever it holds of epochs that are trained again is hidden."""
        if state.is_main:
            self._writer = self._open(len(state.history) + 1)

    def on_epoch_end(self, state: State) -> None:
        """Add the row of the epoch."""
        if self._writer is not None:
            row = state.history[-1]
            for name, value in row.items():
                if name != "epoch":
                    self._writer.add_scalar(name, value, int(row["epoch"]))
            self._writer.flush()

    def on_end(self, state: State) -> None:
        """Close the record."""
        if self._writer is not None:
            self._writer.close()
