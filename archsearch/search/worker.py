"""A worker of a search: does tasks, and knows nothing of the study that they belong to.

``python -m archsearch.search.worker`` reads task directories from standard input, one a line, and ends when
that is closed: its driver's death ends it too, after a checkpoint. ``... worker DIRECTORY`` does one.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from archsearch import files
from archsearch.data import DataSource
from archsearch.errors import DivergedError, IntegrityError, PreemptedError
from archsearch.rebuild import Traced, trace_architecture
from archsearch.search.task import (
    RESULT,
    STOP,
    Result,
    Task,
    percent,
    write_progress,
)
from archsearch.search.trial import fresh
from archsearch.trainer import Trained, Trainer, is_main
from archsearch.training.accelerator import as_main_says
from archsearch.training.callbacks import Callback, State


class Workshop:
    """Does tasks in this process; data and traced networks stay open from one to the next.

    Args:
        traced: The reference, where it is in hand and no task's name leads to it.
        trainer: What trains, likewise; without, each task says how.
        watch: Called with the directory of a task after each of its epochs, before ``stop`` is looked for.
        waits: Whether a training that another process is at is waited for, or an error.
    """

    def __init__(
        self,
        traced: Traced | None = None,
        trainer: Trainer | None = None,
        watch: Callable[[Path], object] = lambda task: None,
        *,
        waits: bool = False,
    ) -> None:
        self._traced, self._trainer, self._watch, self._waits = traced, trainer, watch, waits
        self._sources: dict[str, DataSource] = {}
        self._networks: dict[tuple[str, ...], Traced] = {}

    def do(self, directory: Path) -> None:
        """Do a task: its result is there afterwards, whatever went wrong.

        Raises:
            PreemptedError: If a signal came; the same task goes on from its checkpoint.
        """
        if (directory / RESULT).exists():
            return
        try:
            result = self._trained(Task.read(directory), directory)
        except _StoppedError as stopped:
            result = stopped.result
        except DivergedError as error:
            result = Result(diverged=str(error.__cause__ or error))  # whose, the trial's number says
        except PreemptedError:
            raise
        except Exception as error:
            text = str(error)[:10_000] or "no message"
            result = Result(error=text, kind=type(error).__name__, traceback=traceback.format_exc()[-20_000:])
        if is_main():
            result.write(directory)

    def _trained(self, task: Task, directory: Path) -> Result:
        trainer = self._trainer or self._trainer_of(task)
        traced = self._traced or self._network_of(task)
        trained = trainer.train(
            task.label,
            fresh(traced, task.widths, task.seed),
            task.how(),
            task.seed,
            callbacks=[_Report(directory, self._watch)],
        )
        facts = files.read_json(_place(trained) / "result.json", IntegrityError)
        if is_main():
            # Where the training was found in the store, no epoch has told anything.
            write_progress(directory, facts["history"], trained.epochs)
        return Result(
            accuracy=trained.accuracy,
            epochs=trained.epochs,
            seconds=trained.seconds,
            training=str(_place(trained)),
        )

    def _trainer_of(self, task: Task) -> Trainer:
        torch.set_num_threads(task.threads)
        if task.data is None:
            raise IntegrityError(
                f"{task.label}: its images are in the driver's memory: use the engine inline"
            )
        name = task.data.model_dump_json()
        if name not in self._sources:
            self._sources = {name: task.data.opened()}
        data = self._sources[name]
        trainer = Trainer(data, task.device, Path(task.store), waits=self._waits)
        return replace(trainer, checkpoint_every_s=task.checkpoint_every_s).blinded()

    def _network_of(self, task: Task) -> Traced:
        architecture = task.architecture
        parts = (
            architecture.model,
            str(sorted(architecture.arguments.items())),
            str(architecture.input_shape),
            str(list(architecture.gathers)),
            str(architecture.whole_groups),
            str(0 in task.widths.values()),
        )
        if parts not in self._networks:
            traced = trace_architecture(architecture, trust_code=task.trust_code, where=task.label)
            self._networks = {parts: traced}
        return self._networks[parts]


class _StoppedError(Exception):
    """The driver has seen enough of a training."""

    def __init__(self, result: Result) -> None:
        super().__init__("stopped")
        self.result = result


class _Report(Callback):
    """Keeps a task's progress, and ends its training where it is asked to."""

    def __init__(self, directory: Path, watch: Callable[[Path], object]) -> None:
        self._directory, self._watch = directory, watch

    def on_start(self, state: State) -> None:
        """Write the epochs of a training that goes on."""
        if state.history:
            self.on_epoch_end(state)

    def on_epoch_end(self, state: State) -> None:
        """Write the epoch; leave if asked to, which loses nothing: the checkpoint is written."""
        if state.is_main:
            write_progress(self._directory, state.history, state.epochs)
            self._watch(self._directory)
        # The processes of one training might see the file after different epochs.
        left = state.epochs - len(state.history)
        if left and as_main_says((self._directory / STOP).exists()):
            raise _StoppedError(
                Result(
                    accuracy=state.history[-1]["validation_accuracy"],
                    epochs=len(state.history),
                    seconds=state.seconds,
                    stopped=percent(len(state.history), state.epochs),
                )
            )


def _place(trained: Trained) -> Path:
    if trained.directory is None:
        raise IntegrityError("this training was not kept")
    return trained.directory


def main(words: Sequence[str]) -> int:
    """Do the tasks of the directories given, or those that standard input names; return the exit code."""
    workshop = Workshop(waits=True)
    try:
        if words:
            for word in words:
                workshop.do(Path(word))
        else:
            _serve(workshop)
    except PreemptedError as error:
        print(error, file=sys.stderr)  # noqa: T201  the worker's log
        return error.exit_code
    return 0


def _serve(workshop: Workshop) -> None:
    """Do tasks until standard input ends; in the middle of one, that counts as SIGTERM."""
    inbox: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    busy, closed = threading.Event(), threading.Event()

    def listen() -> None:
        rest = b""
        # Not by sys.stdin, whose lock a thread may not hold when the interpreter ends.
        while part := os.read(0, 65_536):
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                inbox.put(os.fsdecode(line))
        closed.set()
        inbox.put(None)
        if busy.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=listen, daemon=True).start()
    while (line := inbox.get()) is not None:
        busy.set()
        if closed.is_set():
            return
        workshop.do(Path(line))
        busy.clear()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
