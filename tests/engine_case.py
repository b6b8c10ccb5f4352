"""A task that a worker anywhere can do in a second or two, and how tests wait for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from archsearch.api import shape_and_arguments
from archsearch.data import load_data
from archsearch.models import resolve
from archsearch.rebuild import Traced, trace_source
from archsearch.recipe import Recipe
from archsearch.search.task import PROGRESS, Data, Result, Task
from archsearch.search.worker import Workshop
from archsearch.space import SearchSpace

LONG_S = 300.0
"""How long anything may take on a machine that does other things too."""


def lenet() -> Traced:
    source = resolve("lenet5")
    data = load_data("digits", image_size=16)
    shape, words = shape_and_arguments(source, data, None, None, {})
    return trace_source(source, words, shape)


def write_task(
    directory: Path, store: Path, *, seed: int = 0, epochs: int = 1, batch_size: int = 256, threads: int = 1
) -> Path:
    """Write the task of a half as wide LeNet on the digits."""
    traced = lenet()
    widths = {name: steps[len(steps) // 2] for name, steps in SearchSpace().allowed(traced.graph).items()}
    data = load_data("digits", image_size=16)
    recipe = Recipe(epochs=epochs, batch_size=batch_size, lr=0.01)
    task = Task(
        label=f"seed {seed}",
        objective="full",
        architecture=traced.architecture({name: int(width) for name, width in widths.items()}, {}),
        recipe=recipe.as_dict(),
        seed=seed,
        data=Data(name="digits", options={"image_size": 16}, fingerprint=data.fingerprint),
        device="cpu",
        threads=threads,
        store=str(store),
        checkpoint_every_s=0.2,
    )
    task.write(directory)
    return directory


def until(condition: Callable[[], object], what: str, limit_s: float = LONG_S) -> None:
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s, f"waited {limit_s:g} s for {what}"
        time.sleep(0.05)


def epochs(task: Path) -> int:
    path = task / PROGRESS
    return len(path.read_text().splitlines()) if path.exists() else 0


def accuracy_of(task: Path) -> float:
    result = Result.read(task)
    assert result is not None
    assert result.error is None, result.error
    assert result.accuracy is not None
    return result.accuracy


def by_hand(directory: Path, epochs: int) -> float:
    """Return what the same task gives in this process, in one go and with a store of its own."""
    task = write_task(
        directory / "by hand" / "tasks" / "00000", directory / "by hand" / "store", epochs=epochs
    )
    threads = torch.get_num_threads()
    try:
        Workshop().do(task)
    finally:
        torch.set_num_threads(threads)
    return accuracy_of(task)
