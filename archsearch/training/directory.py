"""The directory of one training: who made it, its checkpoints, and at the end its result."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from archsearch import files
from archsearch.errors import IntegrityError
from archsearch.recipe import Recipe
from archsearch.tensor_files import read_tensors, write_tensors
from archsearch.training.checkpoint import Checkpoints

BEGAN = "began on"
"""The field of the description that may change while a training goes on."""


class TrainingDirectory:
    """A directory that belongs to one training.

    Args:
        path: Is created if need be.
        is_main: Whether this process writes; the others of a data-parallel training only read.
    """

    def __init__(self, path: Path, *, is_main: bool = True) -> None:
        self.path, self._is_main = path, is_main
        self.checkpoints = Checkpoints(path / "checkpoints")
        self._identity, self._result, self._weights = (
            path / name for name in ("training.json", "result.json", "weights.safetensors")
        )

    def claim(
        self, stack: ExitStack, identity: Mapping[str, Any], machine: Mapping[str, Any], needed_bytes: int
    ) -> None:
        """Take the directory for this training until ``stack`` is closed.

        Args:
            stack: Holds it.
            identity: What decides the training, as plain values.
            machine: Where it begins; it may go on elsewhere.
            needed_bytes: Free space that it needs.

        Raises:
            ResourceError: If it cannot be written or is too small.
            StorageError: If another process has it.
            IntegrityError: If another training made it; names the first field that differs.
        """
        if not self._is_main:
            return
        files.probe(self.path, needed_bytes)
        stack.enter_context(files.lock(self.path))
        files.sweep(self.path)
        if not self._identity.exists():
            files.write_json(self._identity, {**identity, BEGAN: dict(machine)})
            return
        before = files.read_json(self._identity, IntegrityError)
        for field in [*identity, *(name for name in before if name != BEGAN)]:
            old, new = before.get(field), identity.get(field)
            if old != new:
                raise IntegrityError(
                    f"{self.path}: was made by another training: {field} was {old!r} and now is {new!r}; "
                    "give another directory, or delete this one"
                )

    def result(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Return the facts and the weights of a finished training, or ``None`` if it is not finished.

        Raises:
            IntegrityError: If a file is damaged.
        """
        if not self._result.exists():
            return None
        facts = files.read_json(self._result, IntegrityError)
        return facts, read_tensors(self._weights, sha256=facts.pop("weights_sha256"))

    def finish(self, facts: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        """Write the result, the file that says so last of all, and forget the checkpoints."""
        if self._is_main:
            sha256 = write_tensors(self._weights, weights)
            files.write_json(self._result, {**facts, "weights_sha256": sha256})
            self.checkpoints.clear()


def describe(
    model: nn.Module, recipe: Recipe, seed: int, device: torch.device, processes: int
) -> dict[str, Any]:
    """Return what decides the outcome of a training, apart from its data.

    To the last bit it also depends on the ``machine``, on which the same training has another rounding error;
    which one a machine makes is no reason to train a network again.
    """
    network = re.sub(r"0x[0-9a-f]+", "", repr(model))  # a function's address differs every time
    return {
        **{f"recipe.{name}": value for name, value in recipe.as_dict().items()},
        "seed": seed,
        "network": hashlib.sha256(network.encode()).hexdigest()[:16],
        "initial weights": fingerprint(model.state_dict())[:16],
        "device": device.type,
        "processes": processes,
        "torch": torch.__version__,
    }


def machine(device: torch.device) -> dict[str, Any]:
    """Return what else decides it to the last bit: the order of sums."""
    if device.type == "cuda":
        return {"gpu": torch.cuda.get_device_name(device)}
    return {"threads": torch.get_num_threads(), "vectors": torch.backends.cpu.get_cpu_capability()}


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256, in hex, of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
