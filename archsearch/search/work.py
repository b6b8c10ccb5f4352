"""Who finds out what widths are worth: a function called here, or tasks that an engine carries out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from archsearch import errors, files
from archsearch.errors import ArchsearchError, DivergedError
from archsearch.search.engines import Engine
from archsearch.search.task import PROGRESS, RESULT, STOP, TASK, Result, Task, read_progress
from archsearch.trainer import Say

LOSSES = 3
"""How often a task is started again that is lost without one more epoch."""

TASKS = "tasks"
"""The directory of all tasks in that of a run."""

Value = Callable[[Mapping[str, int], int], float]
"""Returns what widths are worth, given a seed; larger is better."""

Watch = Callable[[int], object]
"""Is given the number of a trial after each epoch that is trained in this process."""


@dataclass(frozen=True)
class Finding:
    """How a trial ended.

    Attributes:
        value: What its widths are worth; ``None`` if it has none.
        stopped: Whether this is its value where it was stopped early.
        reason: Why there is no value, by the name of the trial's user attribute: ``diverged``, ``error`` or
            ``lost``.
        kind: With an error, the class of it.
        facts: More user attributes of the trial.
    """

    value: float | None = None
    stopped: bool = False
    reason: tuple[str, str] | None = None
    kind: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def shared(self) -> ArchsearchError | None:
        """Return an error of ours again: it says what is wrong with the run, not with one network."""
        if self.reason is None or self.reason[0] != "error":
            return None
        kind = getattr(errors, self.kind, None) if self.kind else None
        if not isinstance(kind, type) or not issubclass(kind, ArchsearchError):
            return None
        # Some are made from more than a message; the kind that they are of is not.
        plain = next(each for each in kind.__mro__ if "__init__" not in vars(each))
        error: ArchsearchError = plain(self.reason[1])
        return error


class Work(Protocol):
    """Finds out what widths are worth.

    Attributes:
        slots: How many trials it works on at once.
        watch: What looks at a trial while it trains.
    """

    slots: int
    watch: Watch

    def begin(self, number: int, widths: Mapping[str, int], seed: int) -> None:
        """Begin with a trial, or go on with it where an earlier driver left it."""

    def found(self, number: int) -> Finding | None:
        """Return what was found, ``None`` while nobody knows."""

    def progress(self, number: int) -> Mapping[int, float]:
        """Return the values on the way, by percent of the schedule."""

    def stop(self, number: int) -> None:
        """Ask a trial to end where it is."""

    def close(self) -> None:
        """End whatever is going on."""


class Direct:
    """Calls a function, for values that cost no training.

    Args:
        value: Is called in this process.
    """

    slots = 1

    def __init__(self, value: Value) -> None:
        self.watch: Watch = _unwatched
        self._value = value
        self._found: dict[int, Finding] = {}

    def begin(self, number: int, widths: Mapping[str, int], seed: int) -> None:
        """Compute the value."""
        try:
            self._found[number] = Finding(self._value(widths, seed))
        except DivergedError as error:
            self._found[number] = Finding(reason=("diverged", str(error)))

    def found(self, number: int) -> Finding | None:
        """Return the value."""
        return self._found.pop(number)

    def progress(self, number: int) -> Mapping[int, float]:
        """Return nothing: a value comes at once."""
        return {}

    def stop(self, number: int) -> None:
        """Do nothing: it has ended."""

    def close(self) -> None:
        """Do nothing: there is nothing to end."""


class Tasks:
    """Has networks trained by the workers of an engine, one directory a trial.

    Args:
        directory: Of all tasks.
        engine: Carries them out; is closed with this.
        task: Describes the training of widths with a seed.
        say: Takes lines for the user.
    """

    def __init__(
        self,
        directory: Path,
        engine: Engine,
        task: Callable[[Mapping[str, int], int], Task],
        say: Say = lambda line: None,
    ) -> None:
        self._directory, self._engine, self._task, self._say = directory, engine, task, say
        self.slots = engine.slots
        self.watch: Watch = _unwatched
        self._losses: dict[int, tuple[int, int]] = {}

    def begin(self, number: int, widths: Mapping[str, int], seed: int) -> None:
        """Submit the trial's task, unless its result is there already.

        What an earlier driver left there counts if it is of the same training, and a task that ended with an
        error is done again: the reason may be gone. A worker that is still at another training is ended.
        """
        place, task = task_directory(self._directory, number), self._task(widths, seed)
        before = Task.read(place) if (place / TASK).exists() else None
        if before is not None:
            files.sweep(place)  # a worker may have been killed while it wrote
        same = before is not None and _training(before) == _training(task)
        result = Result.read(place)
        if same and result is not None and result.error is None:
            return
        if before is not None and not same:
            self._engine.cancel(place)
        (place / RESULT).unlink(missing_ok=True)
        if not same:
            for name in (PROGRESS, STOP):
                (place / name).unlink(missing_ok=True)
        task.write(place)
        self._engine.submit(place)

    def found(self, number: int) -> Finding | None:
        """Return the content of the task's result; start the task again if its worker was lost."""
        place = task_directory(self._directory, number)
        ended = self._engine.ended(place)
        result = Result.read(place)
        if result is not None:
            return _finding(result)
        return None if ended is None else self._lost(number, ended or "ended without a result")

    def progress(self, number: int) -> Mapping[int, float]:
        """Return the validation accuracies so far."""
        return read_progress(task_directory(self._directory, number))

    def stop(self, number: int) -> None:
        """Leave the file that a worker looks for after each epoch."""
        (task_directory(self._directory, number) / STOP).touch()

    def close(self) -> None:
        """Close the engine."""
        self._engine.close()

    def _lost(self, number: int, why: str) -> Finding | None:
        epochs = len(self.progress(number))
        losses, before = self._losses.get(number, (0, 0))
        losses = 1 if epochs > before else losses + 1
        self._losses[number] = (losses, epochs)
        if losses > LOSSES:
            return Finding(reason=("lost", f"its worker {why}, {losses} times in a row"))
        self._say(f"trial {number}: its worker {why}: started again from its checkpoint")
        self._engine.submit(task_directory(self._directory, number))
        return None


def task_directory(directory: Path, number: int) -> Path:
    """Return the directory of a trial's task."""
    return directory / f"{number:05d}"


def _unwatched(number: int) -> None:
    """Do nothing."""


def _training(task: Task) -> tuple[Any, ...]:
    """Return what decides the result of a task, on whatever machine."""
    return task.architecture.key, task.how(), task.seed, task.data and task.data.fingerprint


def _finding(result: Result) -> Finding:
    if result.diverged is not None:
        return Finding(reason=("diverged", result.diverged))
    if result.error is not None:
        return Finding(reason=("error", result.error), kind=result.kind or "")
    facts: dict[str, Any] = {"epochs": result.epochs, "seconds": result.seconds}
    if result.training is not None:
        facts["training"] = result.training
    return Finding(result.accuracy, result.stopped is not None, facts=facts)
