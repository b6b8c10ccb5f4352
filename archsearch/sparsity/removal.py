"""What a round of a lottery takes away: single weights, or whole channels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from torch import nn

from archsearch.allocation import allocate, select
from archsearch.cost import Cost, CostModel
from archsearch.errors import ArchsearchError
from archsearch.graph import ChannelGraph, Selection
from archsearch.pruners import PRUNERS, Context
from archsearch.rebuild import Traced
from archsearch.space import SearchSpace
from archsearch.sparsity.criteria import shuffled
from archsearch.sparsity.masks import Masks
from archsearch.sparsity.rule import Rule
from archsearch.sparsity.usage import masked_cost, output_layer, uses
from archsearch.surgery import shrink
from archsearch.targets import Target
from archsearch.verification import prunable_graph

Kept = TypeVar("Kept")
"""What stays of the full-size network: masks, or the channels of each group."""


class Removal(Protocol[Kept]):
    """One way of pruning in rounds."""

    def everything(self) -> Kept:
        """Return what stays before the first round."""
        ...

    def further(self, trained: nn.Module, kept: Kept, keep: float, rounds: int) -> Kept:
        """Return what stays after one more round.

        Args:
            trained: What stayed before, trained; not changed.
            kept: What stayed before.
            keep: Share of the whole network that may stay now.
            rounds: Rounds taken, with this one.
        """
        ...

    def by_chance(self, kept: Kept, seed: int) -> Kept:
        """Return as much of each layer, drawn by chance."""
        ...

    def of(self, full: nn.Module, kept: Kept) -> nn.Module:
        """Return a new network: what stays of a full-size one."""
        ...

    def on(self, trained: nn.Module, before: Kept, kept: Kept) -> nn.Module:
        """Return a new network: what stays of ``trained``, of which ``before`` was left already."""
        ...

    def fresh(self, kept: Kept) -> nn.Module:
        """Return what stays with fresh weights; the global random state decides them."""
        ...

    def held(self, kept: Kept) -> Masks | None:
        """Return the masks under which it is trained, if any."""
        ...

    def cost(self, kept: Kept) -> Cost:
        """Return what it costs."""
        ...

    def share(self, kept: Kept) -> float:
        """Return the share of the weights that stays."""
        ...

    def write(self, kept: Kept, stem: Path, provenance: Mapping[str, Any]) -> Path:
        """Write what stays into a file whose name begins with ``stem``; return its path."""
        ...


class WeightRemoval:
    """Take single weights away, as ``Rule`` says.

    Args:
        traced: The full-size network.
        rule: How the masks are chosen.
    """

    def __init__(self, traced: Traced, rule: Rule) -> None:
        self._traced, self._rule = traced, rule
        self._uses = uses(traced.model, traced.example)

    def everything(self) -> Masks:
        """Return no masks at all."""
        return Masks({})

    def further(self, trained: nn.Module, kept: Masks, keep: float, rounds: int) -> Masks:
        """Return masks within the earlier ones."""
        output = output_layer(self._uses)
        return self._rule.masks(trained, keep, rounds=rounds, output=output, within=kept)

    def by_chance(self, kept: Masks, seed: int) -> Masks:
        """Return masks that keep as many weights of each layer."""
        return shuffled(kept, seed)

    def of(self, full: nn.Module, kept: Masks) -> nn.Module:
        """Return a copy with the masks applied."""
        return kept.applied(full)

    def on(self, trained: nn.Module, before: Masks, kept: Masks) -> nn.Module:
        """Return a copy with the masks applied."""
        return kept.applied(trained)

    def fresh(self, kept: Masks) -> nn.Module:
        """Return the network with its own initialisation, the masks applied."""
        return kept.apply(self._traced.fresh(self._traced.graph.sizes)[0])

    def held(self, kept: Masks) -> Masks:
        """Return the masks."""
        return kept

    def cost(self, kept: Masks) -> Cost:
        """Return what the network costs if masked weights are neither stored nor multiplied."""
        return masked_cost(self._traced.cost.reference, self._uses, kept)

    def share(self, kept: Masks) -> float:
        """Return the share of the weights that could go."""
        return kept.share if kept else 1.0

    def write(self, kept: Masks, stem: Path, provenance: Mapping[str, Any]) -> Path:
        """Write the masks as safetensors."""
        path = stem.with_suffix(".safetensors")
        kept.write(path)
        return path


class ChannelRemoval:
    """Take whole channels away until a share of the MACs stays: structured lottery tickets.

    Args:
        traced: The full-size network.
        allocation: ``"global"`` for one threshold, ``"layer"`` for the same share of every channel group.
        method: The pruner that scores channels; one that looks at the weights alone.
    """

    def __init__(self, traced: Traced, allocation: str, method: str = "l1_norm") -> None:
        self._traced = traced
        self._allocation = {"global": "global", "layer": "local"}[allocation]
        self._pruner = PRUNERS[method]()
        self._least = {name: some.min() for name, some in SearchSpace().allowed(traced.graph).items()}

    def everything(self) -> Selection:
        """Return all channels."""
        return {name: np.arange(size) for name, size in self._traced.graph.sizes.items()}

    def further(self, trained: nn.Module, kept: Selection, keep: float, rounds: int) -> Selection:
        """Return channels out of the earlier ones.

        Raises:
            InfeasibleError: If no widths have so few MACs.
            ArchsearchError: If the smaller network has other channel groups than the full-size one.
        """
        trained = trained.eval()
        graph = self._graph(trained)
        if graph.sizes != _widths(kept):
            raise ArchsearchError(
                f"what round {rounds - 1} left of {self._traced.name} has other channel groups than the "
                "whole: give fewer --rounds"
            )
        scores = self._pruner.score(Context(trained, graph))
        limit = int(keep * self._traced.cost.reference.macs)
        allowed = {name: np.arange(least, graph.sizes[name] + 1) for name, least in self._least.items()}
        targets = [Target("flops", absolute=limit)]
        widths = allocate(self._allocation, CostModel(trained, graph), scores, dict, allowed, targets)
        return {name: kept[name][some] for name, some in select(scores, widths).items()}

    def by_chance(self, kept: Selection, seed: int) -> Selection:
        """Return as many channels of each group."""
        draw = np.random.default_rng(seed)
        sizes = self._traced.graph.sizes
        return {
            name: np.sort(draw.permutation(sizes[name])[: len(some)]).astype(np.int64)
            for name, some in kept.items()
        }

    def of(self, full: nn.Module, kept: Selection) -> nn.Module:
        """Return the small network with the kept slices."""
        return shrink(full, self._traced.graph, kept)

    def on(self, trained: nn.Module, before: Selection, kept: Selection) -> nn.Module:
        """Return the smaller network with the kept slices of the small one."""
        places = {name: np.searchsorted(some, kept[name]) for name, some in before.items()}
        graph = self._graph(trained.eval())
        return shrink(trained, graph, places)

    def fresh(self, kept: Selection) -> nn.Module:
        """Return the small network with its own initialisation."""
        return self._traced.fresh(_widths(kept))[0]

    def _graph(self, small: nn.Module) -> ChannelGraph:
        traced = self._traced
        return prunable_graph(small, traced.example, whole_groups=traced.graph.whole_groups)

    def held(self, kept: Selection) -> None:
        """Return nothing: there is nothing to hold at zero."""

    def cost(self, kept: Selection) -> Cost:
        """Return what the small network costs."""
        return self._traced.cost.of(_widths(kept))

    def share(self, kept: Selection) -> float:
        """Return the share of all parameters."""
        return self.cost(kept).params / self._traced.cost.reference.params

    def write(self, kept: Selection, stem: Path, provenance: Mapping[str, Any]) -> Path:
        """Write the widths as an architecture file."""
        path = stem.with_suffix(".yaml")
        self._traced.architecture(_widths(kept), provenance).write(path)
        return path


def _widths(kept: Selection) -> dict[str, int]:
    return {name: len(some) for name, some in kept.items()}
