"""Which widths a group may have: floors, multiples, layers that stay as they are, and ties of groups."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, floor
from pathlib import Path

import numpy as np

from archsearch.errors import SpecError, UsageError
from archsearch.files import read_yaml
from archsearch.graph import STAYS, ChannelGraph, ChannelGroup, layer_of
from archsearch.ties import Allowed
from archsearch.ties import Widths as Widths


@dataclass(frozen=True)
class Bounds:
    """Limits on the width of a group.

    Args:
        min_keep: Smallest share of the units that stays, in ``[0, 1]``.
        max_keep: Largest share that stays.
        min_width: Fewest channels that its first layer keeps.
        round_to: Its first layer's channels are a multiple of this, or all of them.
    """

    min_keep: float = 0.1
    max_keep: float = 1.0
    min_width: int = 1
    round_to: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.min_keep <= self.max_keep <= 1:
            raise UsageError(
                f"min_keep {self.min_keep:g} and max_keep {self.max_keep:g}: they must be shares that stay, "
                "0 <= min_keep <= max_keep <= 1"
            )
        if self.min_width < 1:
            raise UsageError(f"min_width {self.min_width}: a layer keeps at least 1 channel")
        if self.round_to < 1:
            raise UsageError(f"round_to {self.round_to}: channels are multiples of 1 or more")


@dataclass(frozen=True)
class SearchSpace:
    """Bounds for all groups, exceptions by name, and layers whose channels all stay.

    Args:
        bounds: What holds where nothing else is said.
        groups: Exceptions by shell pattern on a group's name or one of its layers; the last match counts.
        ignore: Shell patterns of layers whose output channels all stay.
        known: Widths of each group beyond which nothing may go, such as those that a latency table knows.
        drop_branches: Whether the groups of a residual branch may have width 0, all together, so that the
            shortcut alone is left.
        ties: Patterns, as for ``groups``; those that stand together tie all groups that one of them matches,
            which then keep the same share.
    """

    bounds: Bounds = Bounds()
    groups: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    ignore: Sequence[str] = ()
    drop_branches: bool = False
    known: Mapping[str, Sequence[int]] = field(default_factory=dict)
    ties: Sequence[Sequence[str]] = ()

    @classmethod
    def read(cls, path: str | Path) -> SearchSpace:
        """Read a space from YAML: ``bounds``, ``groups``, ``ignore``, ``drop_branches``, ``ties`` as above.

        Of a tie, one pattern may stand without brackets.

        Raises:
            SpecError: If the file breaks a rule; says which.
        """
        content = read_yaml(path).data
        unknown = content.keys() - {"bounds", "groups", "ignore", "drop_branches", "ties"}
        if unknown:
            raise SpecError(
                f"{path}: {sorted(unknown)[0]}: unknown; known are bounds, groups, ignore, drop_branches "
                "and ties"
            )
        ignore = content.get("ignore", [])
        if not isinstance(ignore, list) or not all(isinstance(pattern, str) for pattern in ignore):
            raise SpecError(f"{path}: ignore: must be a list of patterns such as 'layer1.*'")
        groups = content.get("groups", {})
        if not isinstance(groups, dict):
            raise SpecError(f"{path}: groups: must map patterns to bounds")
        drop_branches = content.get("drop_branches", False)
        if not isinstance(drop_branches, bool):
            raise SpecError(f"{path}: drop_branches: must be true or false, not {drop_branches!r}")
        bounds = _bounds(Bounds(), content.get("bounds", {}), f"{path}: bounds")
        for pattern, exceptions in groups.items():
            _bounds(bounds, exceptions, f"{path}: groups.{pattern}")
        ties = _ties(content.get("ties", []), f"{path}: ties")
        return cls(bounds, groups, tuple(ignore), drop_branches, ties=ties)

    def allowed(self, graph: ChannelGraph) -> Allowed:
        """Return the widths that each group may have, rising; never empty.

        Raises:
            UsageError: If a pattern matches nothing in the network, branches are to be dropped where none
                may vanish, or groups cannot be tied.
        """
        layers = {name: _layers(group) for name, group in graph.groups.items()}
        frozen = {layer.layer for layer in graph.frozen}
        for pattern in [*self.ignore, *self.groups]:
            if not fnmatch.filter({*frozen, *(n for names in layers.values() for n in names)}, pattern):
                raise UsageError(
                    f"the pattern '{pattern}' matches no layer; `archsearch show` lists the names"
                )
        widths = {}
        for name, group in graph.groups.items():
            if any(fnmatch.filter(layers[name], pattern) for pattern in self.ignore):
                widths[name] = np.array([group.size])
                continue
            bounds = self.bounds
            for pattern, exceptions in self.groups.items():
                if fnmatch.filter(layers[name], pattern):
                    bounds = _bounds(bounds, exceptions, pattern)
            widths[name] = _allowed(graph, group, bounds)
            if name in self.known:
                widths[name] = np.intersect1d(widths[name], np.array(self.known[name], dtype=np.int64))
                if not len(widths[name]):
                    raise UsageError(f"no allowed width of {name} is in the latency table: loosen the bounds")
        droppable = self._droppable(graph)
        allowed = Allowed(widths)
        for patterns in self.ties:
            allowed = allowed.tied(_matched(patterns, layers, droppable), graph.sizes, ", ".join(patterns))
        for name in droppable:
            allowed[name] = np.concatenate([[0], allowed[name]])
        return allowed

    def _droppable(self, graph: ChannelGraph) -> list[str]:
        """Return the groups of the branches that may vanish and hold no layer to ignore."""
        if not self.drop_branches:
            return []
        if not graph.branches:
            raise UsageError(
                "branches are to be dropped, but no residual branch of this network may vanish; "
                "`archsearch show` says why"
            )
        return [
            name
            for branch in graph.branches
            if not any(fnmatch.filter({*branch.layers, *branch.groups}, pattern) for pattern in self.ignore)
            for name in branch.groups
        ]


def _matched(
    patterns: Sequence[str], layers: Mapping[str, Sequence[str]], droppable: Sequence[str]
) -> list[str]:
    """Return the groups that the patterns of a tie match."""
    for pattern in patterns:
        if not any(fnmatch.filter(names, pattern) for names in layers.values()):
            raise UsageError(
                f"ties: the pattern '{pattern}' matches no channel group; `archsearch show` lists the names"
            )
    matched = [
        name for name, names in layers.items() if any(fnmatch.filter(names, pattern) for pattern in patterns)
    ]
    if len(matched) < 2:
        raise UsageError(
            f"ties: {', '.join(patterns)} matches {matched[0]} alone: a tie is of 2 groups or more"
        )
    for name in matched:
        if name in droppable:
            raise UsageError(
                f"ties: {name} is in a residual branch that may vanish, and cannot be tied: ignore one of "
                "the branch's layers, or leave drop_branches out"
            )
    return matched


def _ties(content: object, where: str) -> tuple[tuple[str, ...], ...]:
    if not isinstance(content, list):
        raise SpecError(f"{where}: must be a list of patterns such as 'layer1.*', or of lists of patterns")
    ties = [[tie] if isinstance(tie, str) else tie for tie in content]
    for tie in ties:
        if not isinstance(tie, list) or not tie or not all(isinstance(pattern, str) for pattern in tie):
            raise SpecError(f"{where}: {tie!r} is no pattern such as 'layer1.*' and no list of patterns")
    return tuple(map(tuple, ties))


def _layers(group: ChannelGroup) -> list[str]:
    return [group.name, *(layer_of(member.tensor) for member in group.producers)]


def _bounds(default: Bounds, exceptions: object, where: str) -> Bounds:
    known = list(Bounds.__dataclass_fields__)
    if not isinstance(exceptions, Mapping):
        raise SpecError(f"{where}: must be a mapping of {', '.join(known)}")
    for key, value in exceptions.items():
        if key not in known:
            raise SpecError(f"{where}.{key}: unknown; known are {', '.join(known)}")
        whole = key in ("min_width", "round_to")
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            raise SpecError(f"{where}.{key}: must be a {'whole ' if whole else ''}number, not {value!r}")
    try:
        return replace(default, **exceptions)
    except UsageError as error:
        raise SpecError(f"{where}: {error}") from None


def _allowed(graph: ChannelGraph, group: ChannelGroup, bounds: Bounds) -> Widths:
    first = group.producers[0]
    staying = int((graph.units[first.tensor, first.dim] == STAYS).sum())
    lowest = max(1, ceil(bounds.min_keep * group.size), ceil((bounds.min_width - staying) / first.count))
    highest = max(1, floor(bounds.max_keep * group.size))
    widths = np.arange(min(lowest, highest), highest + 1)
    multiples = widths[(staying + widths * first.count) % bounds.round_to == 0]
    # The full width always stands: a layer need not shrink, and its size may be no multiple.
    full = [group.size] if highest == group.size or not len(multiples) else []
    return np.union1d(multiples, np.array(full, dtype=np.int64))
