"""Measurements as they come, a line for each group: a profile that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from archsearch import files
from archsearch.latency.content import Times

MAX_BYTES = 64 * 2**20

_MEASURED = TypeAdapter(dict[str, Times])


class Journal:
    """A file of measurements beside the table that they are for.

    A journal that was begun under other conditions is not used, and started afresh. A line that is not whole,
    since its writer was killed, is measured again.

    Args:
        path: The file; ``None`` keeps the measurements in memory alone.
        conditions: Plain values that every measurement depends on.

    Attributes:
        path: The file.
        of_others: Whether there was one of other conditions in its place.
    """

    def __init__(self, path: Path | None, conditions: Mapping[str, Any]) -> None:
        self.path = path
        text = json.dumps(conditions, sort_keys=True)
        header = json.dumps({"conditions": hashlib.sha256(text.encode()).hexdigest()})
        self._known: dict[str, Times] = {}
        self.of_others = False
        if path is None:
            return
        lines = files.read_text(path, MAX_BYTES).splitlines() if path.exists() else []
        if lines and lines[0] == header:
            for line in lines[1:]:
                self._remember(line)
        else:
            self.of_others = bool(lines)
            files.write_text(path, f"{header}\n")

    def __len__(self) -> int:
        return len(self._known)

    def count(self, kind: str) -> int:
        """Return how many measurements there are whose names begin with a word."""
        return sum(name.startswith(f"{kind} ") for name in self._known)

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def __getitem__(self, name: str) -> Times:
        return self._known[name]

    def add(self, measured: Mapping[str, Times]) -> None:
        """Write down what was measured together, by name, as one line: each has to reach the disk."""
        self._known.update(measured)
        if self.path is not None:
            line = {name: times.model_dump(mode="json") for name, times in measured.items()}
            files.append_line(self.path, json.dumps(line))

    def remove(self) -> None:
        """Remove the file: everything is in the table."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _remember(self, line: str) -> None:
        try:
            self._known.update(_MEASURED.validate_json(line))
        except ValidationError:
            return
