"""What the dashboard shows besides numbers: notes, pictures, architecture files and figures.

Everything is kept where Optuna keeps such things: texts and figures in the study, files in ``RUN/artifacts``.
Only the driver writes there. Notes and figures are written by optuna-dashboard's own functions and pictures
drawn by matplotlib and plotly: what is not installed is left out, and the search is the same without it.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import optuna
from optuna.artifacts import FileSystemArtifactStore, get_all_artifact_meta, upload_artifact
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.exceptions import ExperimentalWarning
from optuna.trial import FrozenTrial

from archsearch.search.facts import FACTS
from archsearch.search.notes import of_study, of_trial
from archsearch.search.overview import Overview, unit
from archsearch.search.sampler import WIDTHS
from archsearch.search.sketches import draw_training, draw_trial_widths
from archsearch.search.task import TASK, Result, Task
from archsearch.search.work import TASKS, task_directory

DIRECTORY = "artifacts"
"""In a run directory. Drivers that share a study keep the files of their own trials, each in its own run."""

FIGURES = ("accuracy", "finals", "widths", "utility", "keeps")
"""The pictures that the dashboard has no page of its own for."""


def annotate(study: optuna.Study, run: Path, plots: Sequence[Path] = ()) -> None:
    """Name the objective, write the study's note, and keep its plots; doing it again changes nothing.

    The driver calls this when the study has its facts, and again with what ``write_plots`` returned.

    Args:
        study: With its ``facts``.
        run: The run directory.
        plots: Pictures to keep as artifacts of the study; with them come the figures of the dashboard.
    """
    facts = study.user_attrs[FACTS]
    names = [unit(facts)]
    if study.metric_names != names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            study.set_metric_names(names)
    _write_note(study, None, of_study(facts))
    for path in plots:
        if path.suffix == ".png":
            _keep(study, study, run, path)
    if plots and _dashboard() and find_spec("plotly") is not None:
        _write_figures(study, run)


def annotate_trial(study: optuna.Study, run: Path, number: int) -> None:
    """Keep the note and the files of a trial: architecture, picture of the widths, training curve.

    The driver calls this when the trial's result is there, right *before* it tells it: Optuna takes nothing
    for a trial that is finished. Doing it again changes nothing. A trial that trained nothing has its note
    alone.

    Args:
        study: With its ``facts``.
        run: The run directory, whose task of this number is read if there is one.
        number: Of the trial.
    """
    trial = study.get_trials(deepcopy=False)[number]
    facts = study.user_attrs[FACTS]
    if WIDTHS not in trial.user_attrs:
        return
    groups = [(str(name), int(size)) for name, size in facts["groups"]]
    widths = json.loads(trial.user_attrs[WIDTHS])
    _write_note(study, trial, of_trial(trial, facts, widths))
    task = task_directory(run / TASKS, number)
    if not (task / TASK).exists():
        return
    with tempfile.TemporaryDirectory(dir=run, prefix=".artifacts-") as temporary:
        place = Path(temporary)
        Task.read(task).architecture.write(place / "architecture.yaml")
        if find_spec("matplotlib") is not None:
            draw_trial_widths(groups, widths, f"trial {number}", place / "widths.png")
            result = Result.read(task)
            if result is not None and result.training is not None:
                draw_training(Path(result.training), f"trial {number}", place / "training.png")
        for path in sorted(place.iterdir()):
            _keep(study, trial, run, path)


class Folders:
    """The artifacts of several run directories as one store; what is new goes into the first.

    Args:
        runs: The run directories.
    """

    def __init__(self, runs: Sequence[Path]) -> None:
        self._stores = [FileSystemArtifactStore(run / DIRECTORY) for run in runs]

    def open_reader(self, artifact_id: str) -> BinaryIO:
        """Open an artifact in the first directory that has it.

        Raises:
            ArtifactNotFound: If none has.
        """
        for store in self._stores:
            with contextlib.suppress(ArtifactNotFound):
                return store.open_reader(artifact_id)
        raise ArtifactNotFound("not found")

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """Keep an artifact in the first directory."""
        self._stores[0].write(artifact_id, content_body)

    def remove(self, artifact_id: str) -> None:
        """Remove an artifact from the first directory."""
        self._stores[0].remove(artifact_id)


def _keep(study: optuna.Study, owner: optuna.Study | FrozenTrial, run: Path, path: Path) -> None:
    """Keep a file as an artifact, in the place of one of the same name."""
    storage = study._storage  # Optuna has no public way from a study to its storage
    (run / DIRECTORY).mkdir(exist_ok=True)
    store = FileSystemArtifactStore(run / DIRECTORY)
    for meta in get_all_artifact_meta(owner, storage=storage):
        if meta.filename == path.name:
            with path.open("rb") as content:
                store.write(meta.artifact_id, content)
            return
    upload_artifact(artifact_store=store, file_path=str(path), study_or_trial=owner, storage=storage)


def _dashboard() -> bool:
    return find_spec("optuna_dashboard") is not None


def _write_note(study: optuna.Study, trial: FrozenTrial | None, body: str) -> None:
    if not _dashboard():
        return
    from optuna_dashboard import get_note, save_note

    # What these functions ask of a trial; one that was asked for by another process has no more.
    handle: Any = study
    if trial is not None:
        handle = SimpleNamespace(storage=study._storage, study=study, _trial_id=trial._trial_id)
    if get_note(handle) != body:
        save_note(handle, body)


def _write_figures(study: optuna.Study, run: Path) -> None:
    from optuna_dashboard import save_plotly_graph_object

    from archsearch.search.figures import figures
    from archsearch.search.pictures import PICTURES

    for name, figure in figures(Overview.of(study, run)).items():
        if name in FIGURES:
            figure.update_layout(title=PICTURES[name].title, margin_t=90)
            save_plotly_graph_object(study, figure, graph_object_id=name)
