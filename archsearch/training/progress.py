"""Show how far a training is: a bar on a terminal, a plain line an epoch elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from archsearch.training.callbacks import Callback, Row, State


class ProgressBar(Callback):
    """Show epoch, rate, time left and the last accuracy.

    Args:
        label: What is being trained.
        console: Where to show it; standard error by default, so that results can be piped.
    """

    REFRESH_S = 0.2

    def __init__(self, label: str, console: Console | None = None) -> None:
        self._label = label
        self._console = console or Console(stderr=True, soft_wrap=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._shown_at = self._started_at = self._epoch_at = 0.0
        self._images_before = 0

    def on_start(self, state: State) -> None:
        """Open the bar where the training begins or goes on."""
        self._started_at = self._epoch_at = time.monotonic()
        self._images_before = state.images
        if not state.is_main:
            return
        if state.epoch or state.batch:
            self._console.print(
                f"{self._label}: goes on at epoch {state.epoch + 1}, step {state.batch}", markup=False
            )
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self._console)
            total, done = state.epochs * state.batches, state.epoch * state.batches + state.batch
            self._task = self._bar.add_task(self._label, total=total, completed=done, note="")
            self._bar.start()

    def on_step(self, state: State) -> None:
        """Move the bar, a few times a second at most."""
        now = time.monotonic()
        if self._bar is None or now - self._shown_at < self.REFRESH_S:
            return
        self._shown_at = now
        rate = (state.images - self._images_before) / max(now - self._started_at, 1e-9)
        note = f"epoch {min(state.epoch + 1, state.epochs)}/{state.epochs}  {rate:,.0f} images/s"
        if state.history:
            note += _validated(state.history[-1])
        self._bar.update(self._task, completed=state.epoch * state.batches + state.batch, note=note)

    def on_epoch_end(self, state: State) -> None:
        """Print the epoch's line where there is no bar."""
        if not state.is_main or self._bar is not None:
            return
        now = time.monotonic()
        row, left = state.history[-1], state.epochs - len(state.history)
        self._console.print(
            f"{self._label}: epoch {row['epoch']:.0f}/{state.epochs}  loss {row['train_loss']:.4f}"
            f"{_validated(row)}  {now - self._epoch_at:.1f} s  "
            f"about {left * (now - self._epoch_at):.0f} s left",
            markup=False,
            highlight=False,
        )
        self._epoch_at = now

    def on_end(self, state: State) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=state.epoch * state.batches + state.batch)
            self._bar.stop()


def _validated(row: Row) -> str:
    """Return the validation accuracy as shown, nothing where no images were held out."""
    return f"  validation {row['validation_accuracy']:.2f} %" if "validation_accuracy" in row else ""
