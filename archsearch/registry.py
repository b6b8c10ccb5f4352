"""Names to things: what the command line lists, and where outside packages join."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from archsearch.errors import UnknownNameError, UsageError

T = TypeVar("T")


class Registry(Generic[T]):
    """A table of named things of one kind.

    Packages outside join by the entry-point group ``archsearch.<plural>``: each entry point's name is the
    registered name and its object the thing. They are imported when first asked for, never before.

    Args:
        kind: The singular noun for messages, such as ``"pruner"``.
        plural: The noun of the entry-point group; ``kind + "s"`` by default.
        hint: What else a user may write where a name is expected; shown with the error.
    """

    def __init__(self, kind: str, plural: str | None = None, hint: str = "") -> None:
        self.kind = kind
        self._group = f"archsearch.{plural or kind + 's'}"
        self._hint = hint
        self._things: dict[str, T] = {}
        self._outside_loaded = False

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers its argument as ``name``.

        Raises:
            UsageError: If the name is taken.
        """

        def add(thing: T) -> T:
            if name in self._things:
                raise UsageError(f"the {self.kind} '{name}' is registered twice")
            self._things[name] = thing
            return thing

        return add

    def __getitem__(self, name: str) -> T:
        """Return the thing called ``name``.

        Raises:
            UnknownNameError: If there is none; says the nearest names.
        """
        if name not in self._things:
            self._load_outside()
        try:
            return self._things[name]
        except KeyError:
            raise UnknownNameError(self.kind, name, self._things, self._hint) from None

    def __contains__(self, name: object) -> bool:
        if name not in self._things:
            self._load_outside()
        return name in self._things

    def __iter__(self) -> Iterator[str]:
        self._load_outside()
        return iter(sorted(self._things))

    def names(self, pattern: str = "*") -> list[str]:
        """Return the sorted names that match a shell pattern such as ``"resnet*"``."""
        return [name for name in self if fnmatch.fnmatchcase(name, pattern)]

    def _load_outside(self) -> None:
        if self._outside_loaded:
            return
        self._outside_loaded = True
        for point in entry_points(group=self._group):
            if point.name not in self._things:
                self._things[point.name] = point.load()
