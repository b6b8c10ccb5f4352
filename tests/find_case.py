"""A small search that tests run in their own process and, to kill it, in others.

``python find_case.py DIRECTORY STEP`` searches once in peace, then once more, killed in that step of the
second arm, and again. It prints how the three ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from training_case import SignalAt, in_child, source

from archsearch.api import find
from archsearch.pipeline import Found
from archsearch.recipe import Recipe
from archsearch.training.callbacks import Callback, State

FACTORY = f"{Path(__file__).parent / 'tiny_net.py'}:tiny"
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(Path(__file__).parents[1]),
    "OMP_NUM_THREADS": "1",
}
"""What another process needs to run archsearch from this source tree."""

EPOCHS, STEPS = 4, 6
RECIPE = Recipe(lr=0.05, nesterov=True, batch_size=8, epochs=EPOCHS, schedule="cosine")

# Multiply-adds and parameters of the network on 2x6x6 images of 3 classes, layer by layer.
MACS = 36 * 9 * 2 * 8 + 9 * 9 * 8 * 16 + 16 * 3
PARAMS = 9 * 2 * 8 + 2 * 8 + 9 * 8 * 16 + 2 * 16 + 16 * 3 + 3


class CountSteps(Callback):
    """Count the optimiser steps of all trainings that it is given to."""

    def __init__(self) -> None:
        self.steps = 0

    def on_step(self, state: State) -> None:
        self.steps += 1


def search(directory: Path, **options: Any) -> Found:
    """Search with small data into ``directory``; options as for ``find``."""
    defaults: dict[str, Any] = {
        "model": FACTORY,
        "trust_code": True,
        "flops": 0.5,
        "data": source(),
        "recipe": RECIPE,
        "device": "cpu",
        "out": directory / "out",
        "store": directory / "store",
    }
    return find(**{**defaults, **options})


def kill_and_resume(directory: Path, step: int) -> None:
    torch.set_num_threads(1)

    def killer(label: str, place: Path) -> Sequence[Callback]:
        return [SignalAt(step, signal.SIGKILL)] if label.startswith("uniform") else []

    def run(name: str, **options: Any) -> int:
        def body() -> None:
            search(directory / name, **options)

        return in_child(body)

    print(json.dumps([run("peaceful"), run("interrupted", callbacks=killer), run("interrupted")]))


if __name__ == "__main__":
    kill_and_resume(Path(sys.argv[1]), int(sys.argv[2]))
