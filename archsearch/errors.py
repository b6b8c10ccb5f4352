"""The errors that archsearch raises on purpose, and the exit code of each kind.

ArchsearchError                    1
├── UsageError                     2   an option or an argument that cannot be
│   └── UnknownNameError           2   a name that no registry knows; says the nearest
├── SpecError                      3   an architecture file or search space that breaks a rule
├── IntegrityError                 4   a checkpoint, weights file or data set that is not what it should be
├── StorageError                   5   a run directory or study that somebody else holds
├── InfeasibleError                6   a target that no width reaches
├── DivergedError                  7   a loss that is not finite
├── ResourceError                  8   disk full, read-only, out of memory
└── PreemptedError                75   stopped by a signal after a checkpoint; the same command goes on

Every message says what is wrong, where, and how to mend it. The command line prints it in one line and
shows no traceback, unless ``ARCHSEARCH_DEBUG=1`` is set.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ArchsearchError(Exception):
    """The root of the tree above."""

    exit_code = 1


class UsageError(ArchsearchError):
    """An option or an argument that cannot be."""

    exit_code = 2


class UnknownNameError(UsageError):
    """A name that no registry knows.

    Args:
        kind: What was named, such as ``"model"``.
        name: The unknown name.
        known: The names that would have done.
        hint: What else can be given, such as ``"or path/file.py:factory"``.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        self.kind, self.name = kind, name
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        if near:
            rest = f"did you mean {' or '.join(near)}?"
        elif known:
            rest = f"known: {', '.join(known[:20])}{', …' if len(known) > 20 else ''}"
        else:
            rest = "none is known"
        super().__init__(f"unknown {kind} '{name}': {rest}{' ' + hint if hint else ''}")


class SpecError(ArchsearchError):
    """A file that breaks a rule: ``file:line: field: reason``."""

    exit_code = 3


class IntegrityError(ArchsearchError):
    """A checkpoint, weights file or data set that is not what it should be."""

    exit_code = 4


class StorageError(ArchsearchError):
    """A run directory or study that somebody else holds, or that cannot be read."""

    exit_code = 5


class InUseError(StorageError):
    """A directory that another process holds: wait for it, or take another."""


class InfeasibleError(ArchsearchError):
    """A target that no width reaches; the message says what can be reached."""

    exit_code = 6


class DivergedError(ArchsearchError):
    """A loss, gradient or weight that is not finite."""

    exit_code = 7


class ResourceError(ArchsearchError):
    """Disk full, read-only directory, or out of memory."""

    exit_code = 8


class PreemptedError(ArchsearchError):
    """Stopped by a signal after a checkpoint was written; the same command goes on from there."""

    exit_code = 75
