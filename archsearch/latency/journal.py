"""Measurements as they come, one line each, so that a profile that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from archsearch import files
from archsearch.latency.table import Times

MAX_BYTES = 64 * 2**20


class Journal:
    """A file of measurements beside the table that they are for.

    A journal that was begun under other conditions is not used, and started afresh. A line that is not whole,
    since its writer was killed, is measured again.

    Args:
        path: The file; ``None`` keeps the measurements in memory alone.
        conditions: Plain values that every measurement depends on.
    """

    def __init__(self, path: Path | None, conditions: Mapping[str, Any]) -> None:
        self._path = path
        text = json.dumps(conditions, sort_keys=True)
        header = json.dumps({"conditions": hashlib.sha256(text.encode()).hexdigest()})
        self._known: dict[str, Times] = {}
        if path is None:
            return
        lines = files.read_text(path, MAX_BYTES).splitlines() if path.exists() else []
        if lines and lines[0] == header:
            for line in lines[1:]:
                self._remember(line)
        else:
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

    def add(self, name: str, times: Times) -> None:
        """Write down a measurement."""
        self._known[name] = times
        if self._path is not None:
            files.append_line(self._path, json.dumps({"name": name, "times": times.model_dump(mode="json")}))

    def remove(self) -> None:
        """Remove the file: everything is in the table."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _remember(self, line: str) -> None:
        try:
            record = json.loads(line)
            self._known[str(record["name"])] = Times.model_validate_json(json.dumps(record["times"]))
        except (ValueError, KeyError, TypeError, ValidationError):
            return
