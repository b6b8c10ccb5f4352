"""A tiny network with a trainer that watches how each training starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from find_case import EPOCHS, FACTORY
from torch import Tensor
from training_case import source

from archsearch.models import resolve
from archsearch.rebuild import Traced, trace_source
from archsearch.recipe import Recipe
from archsearch.trainer import Trainer
from archsearch.training.callbacks import Callback, State

RECIPE = Recipe(lr=0.05, momentum=0.9, weight_decay=1e-3, batch_size=8, epochs=EPOCHS, schedule="cosine")
"""Of 24 steps: 6 an epoch."""


def traced_tiny() -> Traced:
    return trace_source(resolve(FACTORY, trust_code=True), {}, (2, 6, 6))


@dataclass
class Start:
    """How one training began, and how many steps it took here."""

    label: str
    step: int = 0
    epochs: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0


class _Watch(Callback):
    def __init__(self, start: Start, starts: list[Start]) -> None:
        self._start, self._starts = start, starts

    def on_start(self, state: State) -> None:
        self._start.step, self._start.epochs = state.step, state.epochs
        self._start.weights = {name: value.clone() for name, value in state.model.state_dict().items()}
        self._starts.append(self._start)

    def on_step(self, state: State) -> None:
        self._start.steps += 1


def watched(store: Path, starts: list[Start], others: Sequence[Callback] = ()) -> Trainer:
    """Return a trainer that notes in ``starts`` each training that really begins or goes on."""
    return Trainer(
        source(),
        "cpu",
        store,
        callbacks=lambda label, directory: [_Watch(Start(label), starts), *others],
    )
