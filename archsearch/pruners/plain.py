"""The two baselines that look at nothing: uniform widths and random channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from archsearch.pruners.pruner import PRUNERS, Context, Need, Scores


@PRUNERS.register("uniform")
@dataclass(frozen=True)
class Uniform:
    """Keep the same share of every group, and of each the first channels."""

    source: ClassVar[str] = "width multiplier, Howard et al., MobileNets, 2017, section 3.3"
    allocation: ClassVar[str] = "local"
    needs: ClassVar[tuple[Need, ...]] = ()

    def score(self, context: Context) -> Scores:
        """Return scores that fall with the channel's index."""
        return {name: -np.arange(group.size, dtype=float) for name, group in context.graph.groups.items()}


@PRUNERS.register("random")
@dataclass(frozen=True)
class Random:
    """Keep random channels, over all groups."""

    source: ClassVar[str] = "Mittal et al., Recovering from Random Pruning, WACV 2018"
    allocation: ClassVar[str] = "global"
    needs: ClassVar[tuple[Need, ...]] = ()

    def score(self, context: Context) -> Scores:
        """Return scores drawn uniformly from [0, 1)."""
        draw = np.random.default_rng(context.seed)
        return {name: draw.random(group.size) for name, group in context.graph.groups.items()}
