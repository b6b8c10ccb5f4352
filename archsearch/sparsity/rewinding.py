"""The weights at one step of a training, kept for whoever rewinds to them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from torch import nn

from archsearch.errors import ArchsearchError, UsageError
from archsearch.tensor_files import check_tensors, read_tensors, write_tensors
from archsearch.trainer import Trained, Trainer
from archsearch.training.callbacks import Callback, State

_STEP = re.compile(r"([0-9]{1,12})(it|ep)?")


def parse_step(text: str, batches: int) -> int:
    """Return a number of steps: ``"500it"`` or ``"500"`` steps, ``"2ep"`` epochs of ``batches`` steps each.

    Raises:
        UsageError: If it is neither.
    """
    match = _STEP.fullmatch(text)
    if match is None:
        raise UsageError(f"--rewind {text}: give steps such as 500it, epochs such as 1ep, or 0")
    return int(match[1]) * (batches if match[2] == "ep" else 1)


class WeightsAt(Callback):
    """Write the network's weights and statistics as they are after some step.

    The step comes before the checkpoint that counts it, so a training that is killed and resumed has either
    written the file already or takes the step again, to the very same weights.

    Args:
        step: Steps taken, at least 1.
        directory: Of the training.
    """

    def __init__(self, step: int, directory: Path) -> None:
        self._step, self._path = step, weights_path(directory, step)

    def on_step(self, state: State) -> None:
        """Write them."""
        if state.step == self._step and state.is_main:
            write_tensors(self._path, state.model.state_dict())


def keeping(trainer: Trainer, step: int) -> Trainer:
    """Return a trainer whose trainings keep their weights at some step, at least 1."""

    def callbacks(label: str, directory: Path) -> list[Callback]:
        return [*trainer.callbacks(label, directory), WeightsAt(step, directory)]

    return replace(trainer, callbacks=callbacks)


def rewound(model: nn.Module, trained: Trained, step: int) -> nn.Module:
    """Give a network the weights that a training kept at some step, in place, and return it.

    Raises:
        IntegrityError: If the file is missing or damaged, or another network's.
    """
    if trained.directory is None:
        raise ArchsearchError("the training has no directory, so it kept no weights")
    path = weights_path(trained.directory, step)
    tensors = read_tensors(path)
    check_tensors(tensors, model.state_dict(), str(path))
    model.load_state_dict(tensors)
    return model


def weights_path(directory: Path, step: int) -> Path:
    """Return where a training keeps its weights at some step."""
    return directory / f"weights-at-step-{step}.safetensors"
