"""Checkpoints of a training: whole steps, verified by hash, the two newest kept.

::

    DIRECTORY/
      last.json                  {"step": 1200}, written last of all
      step-000001200/
        tensors.safetensors      weights, optimizer, averaged weights
        state.json               position, history, scaler
        manifest.json            the SHA-256 of the two, written after them
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from archsearch import files
from archsearch.errors import ArchsearchError, DivergedError, IntegrityError
from archsearch.tensor_files import check_tensors, read_tensors, write_tensors

log = logging.getLogger(__name__)

KEPT = 2
REMEDY = "try a smaller --lr, --set warmup=0.1 or --set clip_grad_norm=1"
"""Against a training that diverges."""
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"


class Checkpoints:
    """The checkpoints in one directory, which one process writes.

    A checkpoint is a directory of its own that is never changed; killed at any moment, the process leaves the
    newest whole one findable.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._last = directory / "last.json"

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Write the checkpoint of a step, then forget all but the newest two.

        Raises:
            DivergedError: If a tensor is not finite; nothing is written.
            ResourceError: If the disk is full or read-only; the earlier checkpoints stay.
        """
        check_finite(tensors)
        entry = self._entry(step)
        if entry.exists():  # left by a kill between its first and its last file
            shutil.rmtree(entry)
        files.probe(entry, sum(tensor.nbytes for tensor in tensors.values()))
        hashes = {TENSORS: write_tensors(entry / TENSORS, tensors)}
        files.write_json(entry / STATE, dict(state))
        hashes[STATE] = files.sha256(entry / STATE)
        files.write_json(entry / MANIFEST, hashes)
        files.write_json(self._last, {"step": step})
        self._forget(step)

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the newest good checkpoint, on the CPU, or ``None`` if none was ever finished.

        Damaged ones are passed over, each with a warning.

        Raises:
            IntegrityError: If there are checkpoints and none is good.
        """
        steps = self._steps()
        if not steps and not self._last.exists():
            return None
        for step in sorted(steps, key=lambda step: (step == self._pointed(), step), reverse=True):
            entry = self._entry(step)
            try:
                hashes = files.read_json(entry / MANIFEST, IntegrityError)
                if files.sha256(entry / STATE, IntegrityError) != hashes[STATE]:
                    raise IntegrityError(f"{entry / STATE}: its SHA-256 is not the one in {MANIFEST}")
                return read_tensors(entry / TENSORS, sha256=hashes[TENSORS]), files.read_json(
                    entry / STATE, IntegrityError
                )
            except (ArchsearchError, OSError, KeyError, TypeError) as error:
                log.warning("checkpoint %s is damaged, trying the one before: %s", entry, error)
        raise IntegrityError(
            f"{self._directory}: every checkpoint is damaged; delete the directory to train from the start"
        )

    def clear(self) -> None:
        """Delete all checkpoints, the pointer first: a kill midway leaves nothing that looks damaged."""
        self._last.unlink(missing_ok=True)
        for step in self._steps(finished=False):
            self._drop(step)

    def _entry(self, step: int) -> Path:
        return self._directory / f"step-{step:09d}"

    def _steps(self, *, finished: bool = True) -> list[int]:
        """Return the steps in order; unfinished ones have no manifest and never count as checkpoints."""
        names = (re.fullmatch(r"step-(\d{9,})", path.name) for path in self._directory.glob("step-*"))
        steps = sorted(int(name[1]) for name in names if name)
        return [step for step in steps if not finished or (self._entry(step) / MANIFEST).exists()]

    def _pointed(self) -> int:
        try:
            return int(files.read_json(self._last)["step"])
        except (ArchsearchError, OSError, KeyError, TypeError, ValueError):
            return -1  # the manifests tell as well what is whole

    def _forget(self, last: int) -> None:
        # Later ones than the last are what a resumed training passed over as damaged.
        kept = [step for step in self._steps() if step <= last][-KEPT:]
        for step in self._steps(finished=False):
            if step not in kept:
                self._drop(step)

    def _drop(self, step: int) -> None:
        (self._entry(step) / MANIFEST).unlink(missing_ok=True)  # first: half a checkpoint is none
        shutil.rmtree(self._entry(step), ignore_errors=True)


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise unless every floating-point number is finite.

    Raises:
        DivergedError: Names the first tensor that holds NaN or infinity.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DivergedError(f"training diverged: {name} is not finite; {REMEDY}")


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's tensors as ``INDEX.KEY``; its numbers follow from the recipe and the step."""
    return {
        f"{index}.{key}": value
        for index, entries in optimizer.state_dict()["state"].items()
        for key, value in entries.items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give an optimizer the tensors that ``optimizer_tensors`` took from its like."""
    entries: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        entries.setdefault(int(index), {})[key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": entries, "param_groups": groups})
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            # load_state_dict keeps the file's memory layout; fused kernels expect the parameter's.
            if isinstance(value, Tensor) and value.shape == parameter.shape and key != "step":
                state[key] = torch.empty_like(parameter).copy_(value)


def restore_module(module: nn.Module, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Copy weights into a network of the same names and shapes.

    Raises:
        IntegrityError: If a name or a shape differs.
    """
    check_tensors(tensors, module.state_dict(), str(where))
    module.load_state_dict(tensors)


def section(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
