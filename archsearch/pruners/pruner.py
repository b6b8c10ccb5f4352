"""The seam between pruning methods and everything else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import nn

from archsearch.allocation import Scores
from archsearch.graph import ChannelGraph
from archsearch.registry import Registry

__all__ = ["PRUNERS", "Context", "Pruner", "Scores"]


@dataclass(frozen=True)
class Context:
    """What a pruner may look at; it changes none of it.

    Attributes:
        model: The trained reference, in eval mode.
        graph: Its channel groups.
        seed: For methods that draw.
    """

    model: nn.Module
    graph: ChannelGraph
    seed: int = 0


class Pruner(Protocol):
    """A method that scores channel units.

    Attributes:
        source: The paper, and what in it.
        allocation: The allocation that the method is published with.
    """

    source: ClassVar[str]
    allocation: ClassVar[str]

    def score(self, context: Context) -> Scores:
        """Return what each unit of each group is worth, ``(size,)``; larger is kept.

        The pipeline calls it once, after the reference is trained. The same context gives the same scores.
        """
        ...


PRUNERS: Registry[type[Pruner]] = Registry("pruner")
