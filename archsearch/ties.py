"""Groups that choose together: a tie is one choice for several groups, which keep the same share.

Groups of one size that are tied have one width. Others keep a share that all of them can have, rounded to
the nearest width that is allowed. A tie is a *dimension* of everything that chooses widths, as is each group
that is not tied: what takes a step takes it in all groups of a tie.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from archsearch.errors import UsageError

Widths: TypeAlias = npt.NDArray[np.int64]

Tie: TypeAlias = "tuple[str, ...]"
"""The groups of a tie. The first leads: it gives the tie its name, and no width of it comes twice."""


class Allowed(dict[str, Widths]):
    """The widths that each group may have, rising.

    Tied groups have equally many and are always at the same one of them, counted from the least. A smaller
    group's may repeat.

    Args:
        widths: By group.
        ties: Which groups choose together; their widths are as above.
    """

    def __init__(self, widths: Mapping[str, Widths], ties: Iterable[Tie] = ()) -> None:
        super().__init__(widths)
        self.ties = tuple(ties)

    def tied(self, names: Iterable[str], sizes: Mapping[str, int], label: str) -> Allowed:
        """Return the same with one tie more.

        Args:
            names: Of its groups.
            sizes: Of the groups in the reference.
            label: Says in messages which tie this is.

        Raises:
            UsageError: If a group is tied already, or no share is allowed in all of the groups.
        """
        leader, *others = sorted(names, key=lambda name: len(self[name]))
        for name in (leader, *others):
            if any(name in tie for tie in self.ties):
                raise UsageError(f"ties: {name} is in {label} and in another tie: name it in one of them")
        shares = self[leader] / sizes[leader]
        wanted = {name: shares * sizes[name] for name in others}
        common = np.ones(len(shares), dtype=bool)
        for name, each in wanted.items():
            whole = np.floor(each + 0.5)
            common &= (self[name][0] <= whole) & (whole <= self[name][-1])
        if not common.any():
            raise UsageError(
                f"ties: the groups of {label} have no allowed share in common "
                f"({', '.join((leader, *others))}): loosen their bounds, or tie fewer"
            )
        widths = {name: _nearest(self[name], each[common]) for name, each in wanted.items()}
        return Allowed({**self, leader: self[leader][common], **widths}, [*self.ties, (leader, *others)])

    def up_to(self, widths: Mapping[str, int]) -> Allowed:
        """Return what is left where no group may be wider than in an architecture that is allowed."""
        cut = {name: self[name][self[name] <= width] for name, width in widths.items()}
        for leader, *others in self.ties:
            if leader in cut:
                cut.update({name: self[name][: len(cut[leader])] for name in others})
        return Allowed(cut, self.ties)

    def together(self, widths: Mapping[str, int]) -> dict[str, int]:
        """Return widths with each tie at the one place that is nearest to where its groups are on average."""
        found = dict(widths)
        for tie in self.ties:
            steps = np.stack([self[name] for name in tie])
            away = np.abs(steps - np.array([[widths[name]] for name in tie])) / steps[:, -1:]
            place = int(away.sum(0).argmin())
            found.update({name: int(self[name][place]) for name in tie})
        return found


def _nearest(steps: Widths, wanted: npt.NDArray[np.float64]) -> Widths:
    """Return the step nearest to each number; of two the larger."""
    above = np.minimum(np.searchsorted(steps, wanted), len(steps) - 1)
    below = np.maximum(above - 1, 0)
    return np.where(wanted - steps[below] < steps[above] - wanted, steps[below], steps[above])


class Dimensions:
    """What can be chosen: a place among the allowed widths for each tie, and each group that is not tied.

    Args:
        names: Of all groups, in the order of the columns of widths ``(..., G)``.
        allowed: The widths that each group may have, rising.

    Attributes:
        names: The group that leads each dimension, ``D`` of them, in the order of the groups.
        steps: Its widths.
        of_group: The dimension of each group, ``(G,)``.
    """

    def __init__(self, names: Sequence[str], allowed: Mapping[str, Widths]) -> None:
        self._groups = list(names)
        self._allowed = [allowed[name] for name in names]
        ties = allowed.ties if isinstance(allowed, Allowed) else ()
        leader = {name: tie[0] for tie in ties for name in tie}
        led = [leader.get(name, name) for name in names]
        self.names = [name for name in names if leader.get(name, name) == name]
        self.steps = [allowed[name] for name in self.names]
        column = {name: number for number, name in enumerate(self.names)}
        self.of_group = np.array([column[name] for name in led], dtype=np.int64)

    @property
    def members(self) -> list[list[str]]:
        """The groups of each dimension, first the one that leads."""
        found = [[name] for name in self.names]
        for name, dimension in zip(self._groups, self.of_group, strict=True):
            if name != self.names[dimension]:
                found[dimension].append(name)
        return found

    def at(self, places: Widths) -> Widths:
        """Return the widths at places, ``(..., D) -> (..., G)``."""
        of_group = zip(self._allowed, self.of_group, strict=True)
        return np.stack([steps[places[..., dimension]] for steps, dimension in of_group], axis=-1)

    def spread(self, widths: Widths) -> Widths:
        """Return the widths of all groups where those that lead have given ones, ``(..., D) -> (..., G)``."""
        if len(self.names) == len(self._groups):
            return widths
        places = [np.searchsorted(steps, widths[..., number]) for number, steps in enumerate(self.steps)]
        return self.at(np.stack(places, axis=-1))

    def summed(
        self, curves: Mapping[str, npt.NDArray[np.float64]], *, mean: bool = False
    ) -> list[npt.NDArray[np.float64]]:
        """Return what the places of each dimension sum up to over its groups.

        Args:
            curves: At each of the allowed widths of each group.
            mean: Whether to divide by the number of groups.
        """
        return [
            np.asarray(np.sum([curves[name] for name in group], axis=0)) / (len(group) if mean else 1)
            for group in self.members
        ]
