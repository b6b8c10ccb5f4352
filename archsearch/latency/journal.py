"""Measurements as they come, a line for each group: a profile that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from archsearch import files
from archsearch.latency.cells import Frozen
from archsearch.latency.content import Times

MAX_BYTES = 64 * 2**20


class Entry(Frozen):
    """What one line holds.

    Attributes:
        measured: Together, by name.
        measuring_s: Seconds that this took.
        preparing_s: Seconds before, to make the networks ready.
        seconds: Of the whole profile, for which ``grid`` was chosen.
        grid: Cells that there is time for.
    """

    measured: dict[str, Times] = Field(default_factory=dict)
    measuring_s: float = Field(default=0.0, ge=0)
    preparing_s: float = Field(default=0.0, ge=0)
    seconds: float = Field(default=0.0, ge=0)
    grid: int | None = Field(default=None, ge=0)


class Journal:
    """A file of measurements beside the table that they are for.

    Its name says under which conditions, so that what was measured under others stays where it is. A line
    that is not whole, since its writer was killed, is measured again.

    Args:
        path: The file, without the conditions; ``None`` keeps the measurements in memory alone.
        conditions: Plain values that every measurement depends on.

    Attributes:
        path: The file, such as ``dev.lat.json-0f3a….part``.
        measuring_s: Seconds spent with measuring, by all who wrote it.
        preparing_s: Seconds spent with making networks ready.
    """

    def __init__(self, path: Path | None, conditions: Mapping[str, Any]) -> None:
        self.path = None
        self._known: dict[str, Times] = {}
        self._grids: dict[float, int] = {}
        self.measuring_s = self.preparing_s = 0.0
        if path is None:
            return
        text = json.dumps(conditions, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        self.path = path.with_name(f"{path.stem}-{digest[:12]}{path.suffix}")
        if self.path.exists():
            for line in files.read_text(self.path, MAX_BYTES).splitlines():
                self._remember(line)

    def __len__(self) -> int:
        return len(self._known)

    def count(self, kind: str) -> int:
        """Return how many measurements there are whose names begin with a word."""
        return sum(name.startswith(f"{kind} ") for name in self._known)

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def __getitem__(self, name: str) -> Times:
        return self._known[name]

    def add(self, entry: Entry) -> None:
        """Write an entry down as one line: each has to reach the disk."""
        self._take(entry)
        if self.path is not None:
            files.append_line(self.path, entry.model_dump_json())

    def grid(self, seconds: float) -> int | None:
        """Return how many cells were chosen for a profile of so many seconds; ``None`` if none were yet."""
        return self._grids.get(seconds)

    def remove(self) -> None:
        """Remove the file: everything is in the table."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _remember(self, line: str) -> None:
        try:
            self._take(Entry.model_validate_json(line))
        except ValidationError:
            return

    def _take(self, entry: Entry) -> None:
        self._known.update(entry.measured)
        self.measuring_s += entry.measuring_s
        self.preparing_s += entry.preparing_s
        if entry.grid is not None:
            self._grids[entry.seconds] = entry.grid
