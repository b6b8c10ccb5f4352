"""A small training that tests start in processes of their own, to kill it or to share it.

``python training_case.py kill DIRECTORY POINT...`` trains once for each point, killed there, and once more.
``torchrun ... training_case.py share FILE`` trains in several processes and writes the weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from archsearch.data import Augmentation, DataSource, in_memory
from archsearch.recipe import Recipe
from archsearch.tensor_files import write_tensors
from archsearch.training.callbacks import Callback, State
from archsearch.training.loop import TrainResult, train

CLASSES, STEPS, EPOCHS = 3, 6, 3
RECIPE = Recipe(lr=0.05, nesterov=True, batch_size=8, epochs=EPOCHS, schedule="cosine")
WRITING_CALLS = ("open", "write", "fsync", "replace", "unlink", "rmdir", "mkdir")


def images(count: int = 45, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``count`` noisy images ``(N, 2, 6, 6)`` whose class is where they are bright."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    pictures = torch.randn(count, 2, 6, 6, generator=generator)
    for label in range(CLASSES):
        pictures[labels == label, :, 2 * label : 2 * label + 2] += 2
    return pictures, labels


def source(augmentation: Augmentation | None = None) -> DataSource:
    chosen = Augmentation(pad=1, flip=True) if augmentation is None else augmentation
    return in_memory(*images(), test=images(12, 2), validation=images(15, 1), augmentation=chosen)


def network(seed: int = 0, norm: bool = True, dropout: float = 0.3) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=not norm),
        nn.BatchNorm2d(4) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(144, CLASSES),
    )


def run(
    directory: Path | None = None, recipe: Recipe = RECIPE, model: nn.Module | None = None, **options: Any
) -> TrainResult:
    data = source()
    return train(
        network() if model is None else model,
        data.train,
        data.validation,
        recipe,
        directory=directory,
        device="cpu",
        **options,
    )


def weights_hash(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


class SignalAt(Callback):
    """Send this process a signal in the middle of some step, counted from 1."""

    def __init__(self, step: int, signum: int, times: int = 1) -> None:
        self._step, self._signum, self._times = step, signum, times

    def after_backward(self, state: State) -> None:
        if state.step == self._step - 1:
            for _ in range(self._times):
                os.kill(os.getpid(), self._signum)


def count_writes(at: int) -> list[int]:
    """Make this process kill itself just before its system call number ``at`` that changes a file."""
    made = [0]

    def counting(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            made[0] += 1
            if made[0] == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **named)

        return wrapped

    for name in WRITING_CALLS:
        setattr(os, name, counting(getattr(os, name)))
    return made


def in_child(body: Callable[[], None]) -> int:
    """Run the body in a fork, which saves importing torch again, and return how it ended."""
    child = os.fork()
    if child == 0:
        try:
            body()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_and_resume(directory: Path, points: list[str]) -> None:
    """Print one JSON line for each point: how the first part ended, the rest, and whether the weights agree.

    A point is ``step:4`` (in step 4), ``write:77`` (before the 77th system call that writes), or
    ``write:every:9`` for every ninth of them.
    """
    torch.set_num_threads(1)
    run(epochs=1)  # imports what torch imports late, once for all forks
    once = directory / "uninterrupted"
    in_child(lambda: _record(once, (), 0))
    expected = json.loads(once.with_suffix(".json").read_text())
    for point in points:
        kind, *where = point.split(":")
        numbers = [int(where[-1])] if len(where) == 1 else range(1, expected["writes"] + 1, int(where[-1]))
        for number in numbers:
            path = directory / "interrupted"
            shutil.rmtree(path, ignore_errors=True)
            step, write = (number, 0) if kind == "step" else (0, number)
            first = in_child(partial(_record, path, [SignalAt(step, signal.SIGKILL)], write))
            second = in_child(partial(_record, path, (), 0))
            same = (
                second == 0
                and json.loads(path.with_suffix(".json").read_text())["sha256"] == expected["sha256"]
            )
            print(json.dumps({"point": f"{kind}:{number}", "first": first, "second": second, "same": same}))


def _record(path: Path, callbacks: Any, kill_at_write: int) -> None:
    writes = count_writes(kill_at_write)
    model = run(path, callbacks=callbacks, checkpoint_every_s=0).model
    made = writes[0]
    path.with_suffix(".json").write_text(json.dumps({"sha256": weights_hash(model), "writes": made}))


def share(path: Path) -> None:
    """Train in all processes of a launch; process 0 writes the weights."""
    result = run(model=network(norm=False, dropout=0.0))
    if int(os.environ.get("RANK", "0")) == 0:
        write_tensors(path, result.model.state_dict())
        path.with_suffix(".json").write_text(json.dumps(result.history))


if __name__ == "__main__":
    if sys.argv[1] == "kill":
        kill_and_resume(Path(sys.argv[2]), sys.argv[3:])
    else:
        share(Path(sys.argv[2]))
