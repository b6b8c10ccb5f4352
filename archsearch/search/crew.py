"""Who trains the networks of a search, as a user says it, and the tasks that they get."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from archsearch.architecture import Architecture
from archsearch.errors import UsageError
from archsearch.gathers import spread
from archsearch.rebuild import Traced
from archsearch.search import defaults
from archsearch.search.engines import ENGINES, Order
from archsearch.search.task import Data, Task
from archsearch.search.trial import Scratch
from archsearch.search.work import TASKS, Tasks
from archsearch.search.worker import Workshop
from archsearch.trainer import Say, Trainer

OPTIONS = {
    "address": ["ray"],
    "cpus": ["ray", "slurm"],
    "gpus": ["ray", "slurm"],
    "slurm": ["slurm"],
}
"""The settings of our engines, and whose they are."""


@dataclass(frozen=True)
class Crew:
    """How many workers, and where. Nothing here decides what widths are worth.

    Attributes:
        jobs: Tasks at once.
        engine: Its name; by default this process for one job and local processes for several.
        options: Settings of the engine's own.
        data: Name of the data set, by which workers open it; without, only this process has it.
        data_options: Further arguments of ``load_data``.
        trust_code: Whether workers may import a model that names the user's own code.
    """

    jobs: int = defaults.JOBS
    engine: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    data: str | None = None
    data_options: Mapping[str, Any] = field(default_factory=dict)
    trust_code: bool = False

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise UsageError(f"--jobs {self.jobs}: at least 1")
        ENGINES[self.name]
        for name in self.options:
            if self.name not in (engines := OPTIONS.get(name, [self.name])):
                option = f"--{name}-per-task" if name in ("cpus", "gpus") else f"--{name}"
                raise UsageError(f"{option}: is for --engine {' or '.join(engines)}, not {self.name}")

    @property
    def name(self) -> str:
        """The name of the engine."""
        return self.engine or ("inline" if self.jobs == 1 else "local")

    def tasks(self, out: Path, scratch: Scratch, trainer: Trainer, objective: str, say: Say) -> Tasks:
        """Return the work of a search that trains.

        Args:
            out: Directory of the run.
            scratch: How networks are trained.
            trainer: A blind one.
            objective: Of the search.
            say: Takes lines for the user.

        Raises:
            UsageError: If other processes cannot have this network or this data.
        """
        if self.name != "inline":
            self._check(scratch.traced)
        workshop = Workshop(scratch.traced, trainer, watch=lambda place: work.watch(int(place.name)))
        engine = ENGINES[self.name](Order(self.jobs, trainer.device, workshop.do, self.options))
        describe = self._describing(scratch, trainer, objective, engine.threads)
        work = Tasks((out / TASKS).resolve(), engine, describe, say)
        return work

    def _describing(
        self, scratch: Scratch, trainer: Trainer, objective: str, threads: int
    ) -> Callable[[Mapping[str, int], int], Task]:
        data = None
        if self.data is not None:
            options = {name: value for name, value in self.data_options.items() if value is not None}
            options.pop("download", None)  # the files are there by now
            if "data_dir" in options:
                options["data_dir"] = str(Path(options["data_dir"]).expanduser().resolve())
            data = Data(name=self.data, options=options, fingerprint=trainer.data.fingerprint)

        def describe(widths: Mapping[str, int], seed: int) -> Task:
            return Task(
                label="trial",
                objective=objective,
                architecture=described(scratch.traced, widths),
                recipe=scratch.recipe_of(widths).as_dict(),
                seed=seed,
                data=data,
                device=trainer.device,
                threads=threads,
                store=str(trainer.store.resolve()),
                trust_code=self.trust_code,
                checkpoint_every_s=trainer.checkpoint_every_s,
            )

        return describe

    def _check(self, traced: Traced) -> None:
        if traced.build is None:
            raise UsageError(
                f"--engine {self.name}: {traced.name} is a network in hand, which no other process can build:"
                " name it as file.py:factory, or leave --jobs and --engine out"
            )
        if self.data is None:
            raise UsageError(
                f"--engine {self.name}: the images are in this process's memory: name a data set, "
                "or leave --jobs and --engine out"
            )


def described(traced: Traced, widths: Mapping[str, int]) -> Architecture:
    """Return the architecture of widths whose norms gather what fresh networks of these widths gather."""
    sizes = traced.graph.sizes
    selection = {
        name: spread(width, sizes[name], name) if name in traced.gathers else np.arange(width)
        for name, width in widths.items()
    }
    return traced.architecture(widths, selection=selection)
