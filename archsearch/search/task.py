"""A task of a search: one network to be trained, as a directory that a worker anywhere can read.

``task.json`` says all that decides the outcome. The worker keeps ``progress.jsonl`` beside it, one line an
epoch, and at the end writes ``result.json``. A file ``stop`` there asks it to end after the next epoch. No
worker opens the study, and no driver waits for a worker: both only read and write these files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from archsearch import files
from archsearch.architecture import Architecture
from archsearch.bounded_yaml import dotted, shown
from archsearch.data import DataSource, load_data
from archsearch.errors import ArchsearchError, IntegrityError, SpecError, UsageError
from archsearch.recipe import Recipe
from archsearch.training.callbacks import Row

FORMAT: Final = 1
TASK, RESULT, PROGRESS, STOP = "task.json", "result.json", "progress.jsonl", "stop"

Plain = bool | int | float | str | None
Text = Annotated[str, Field(max_length=65_536)]
Part = TypeVar("Part", bound="_Part")


class _Part(BaseModel):
    """Nothing is converted, nothing is ignored, nothing changes afterwards."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def parsed(cls: type[Part], path: Path, kind: type[ArchsearchError]) -> Part:  # noqa: PYI019  # Self is 3.11
        """Read a file; what breaks the schema is an error of ``kind`` that names the field."""
        data = files.read_json(path, kind)
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = dotted(first["loc"]) or "the file"
            raise kind(
                f"{files.named(path)}: {place}: {first['msg']} (got {shown(first['input'])})"
            ) from error


class Data(_Part):
    """A data set by name, and what it must hold.

    Attributes:
        name: As for ``load_data``.
        options: Its further arguments.
        fingerprint: Of what training sees.
    """

    name: Text
    options: dict[str, Plain] = Field(default_factory=dict)
    fingerprint: Text

    def opened(self) -> DataSource:
        """Open the data set.

        Raises:
            IntegrityError: If it is not the one that the driver sees.
        """
        data = load_data(self.name, **self.options)  # type: ignore[arg-type]  # a wrong one is refused there
        if data.fingerprint != self.fingerprint:
            raise IntegrityError(
                f"{self.name}: this worker sees other images than the driver (fingerprint "
                f"{data.fingerprint[:16]}, not {self.fingerprint[:16]}): give all machines the same files"
            )
        return data


class Task(_Part):
    """One network to be trained.

    Attributes:
        format: Version of this layout.
        label: What people call it.
        objective: The search's, for people; the recipe says how long to train.
        architecture: The network.
        recipe: All its fields; budget and shortening are worked in.
        seed: Of weights and images.
        data: What to train on; ``None`` where only the driver's process has it.
        device: As for ``training.train``.
        threads: CPU threads.
        store: Absolute path of all trainings.
        trust_code: Whether a model that names the user's own code may be imported.
        checkpoint_every_s: Seconds between checkpoints inside an epoch.
    """

    format: int = FORMAT
    label: Text
    objective: Text
    architecture: Architecture
    recipe: dict[str, Any]
    seed: int
    data: Data | None
    device: Text
    threads: Annotated[int, Field(ge=1)]
    store: Text
    trust_code: bool = False
    checkpoint_every_s: Annotated[float, Field(gt=0)] = 300.0

    @model_validator(mode="after")
    def _is_known(self) -> Task:
        if self.format != FORMAT:
            raise ValueError(f"format {self.format}, but this version of archsearch reads {FORMAT}")
        try:
            self.how()
        except UsageError as error:
            raise ValueError(str(error)) from error
        return self

    @property
    def widths(self) -> dict[str, int]:
        """The width of each group."""
        return {name: group.width for name, group in self.architecture.widths.items()}

    def how(self) -> Recipe:
        """Return the recipe."""
        fields = {name: tuple(v) if isinstance(v, list) else v for name, v in self.recipe.items()}
        return Recipe().with_(**fields)

    @classmethod
    def read(cls, directory: Path) -> Task:
        """Read the task of a directory.

        Raises:
            SpecError: If the file is missing or breaks a rule; names the field.
        """
        return cls.parsed(directory / TASK, SpecError)

    def write(self, directory: Path) -> None:
        """Write the task into its directory, which is made."""
        directory.mkdir(parents=True, exist_ok=True)
        files.write_json(directory / TASK, self.model_dump(mode="json"))


class Result(_Part):
    """How a task ended.

    Attributes:
        accuracy: Validation accuracy in percent after the last epoch.
        epochs: Epochs trained.
        seconds: They took, on whatever machine, in whichever run.
        training: Directory of the training.
        stopped: Percent of the schedule after which it was asked to end; then the training has no result.
        diverged: Why there is no accuracy.
        error: What went wrong otherwise.
        kind: Class of that error.
        traceback: Of it, for people.
    """

    accuracy: float | None = None
    epochs: int = 0
    seconds: float = 0.0
    training: Text | None = None
    stopped: int | None = None
    diverged: Text | None = None
    error: Text | None = None
    kind: Text | None = None
    traceback: Text | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Result:
        ends = (self.accuracy, self.diverged, self.error)
        if sum(end is not None for end in ends) != 1:
            raise ValueError("must have one of accuracy, diverged and error")
        return self

    @classmethod
    def read(cls, directory: Path) -> Result | None:
        """Read the result of a task, ``None`` while there is none.

        Raises:
            IntegrityError: If the file is not what a worker writes.
        """
        path = directory / RESULT
        return cls.parsed(path, IntegrityError) if path.exists() else None

    def write(self, directory: Path) -> None:
        """Write the result, after which the task is done."""
        content = self.model_dump(mode="json")
        files.write_json(
            directory / RESULT, {name: value for name, value in content.items() if value is not None}
        )


def write_progress(directory: Path, history: Iterable[Row], epochs: int) -> None:
    """Keep the validation accuracy after each epoch, by percent of the schedule; replaces what was there."""
    lines = [
        {"percent": percent(int(row["epoch"]), epochs), "accuracy": row["validation_accuracy"]}
        for row in history
    ]
    files.write_text(directory / PROGRESS, "".join(json.dumps(line) + "\n" for line in lines))


def read_progress(directory: Path) -> Mapping[int, float]:
    """Return the accuracies so far by percent of the schedule, rising.

    Of several epochs in one percent the first counts, so that nothing depends on when somebody looks.

    Raises:
        IntegrityError: If the file is not what a worker writes.
    """
    path = directory / PROGRESS
    if not path.exists():
        return {}
    try:
        rows = [json.loads(line) for line in files.read_text(path, 2**20, IntegrityError).splitlines()]
        # The last one of equal keys stays.
        found = {int(row["percent"]): float(row["accuracy"]) for row in reversed(rows)}
        return dict(sorted(found.items()))
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{files.named(path)}: is not a task's progress: delete it") from error


def percent(epoch: int, epochs: int) -> int:
    """Return which share of a schedule has passed after an epoch, in whole percent; all of it is 100."""
    return 100 * epoch // epochs
