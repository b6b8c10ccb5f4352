"""Feature maps: what the layers of a group put out, behind their norms and activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.utils import _pytree as pytree

from archsearch.graph import STAYS, ChannelGraph, Units
from archsearch.pruners.norm_scale import is_norm
from archsearch.pruners.pruner import Context, Scores
from archsearch.pruners.reading import CONTRACTIONS, ContractionMode
from archsearch.rules import op_name
from archsearch.tracing import call_model, untouched

SeeMaps: TypeAlias = Callable[[torch.Tensor, Units], None]
"""Gets feature maps, ``(N, C, H, W)``, and the unit of each channel in the whole graph, or ``STAYS``."""


def watch_features(context: Context, images: int, see: SeeMaps) -> None:
    """Run a network in eval mode on calibration images and show its feature maps to a function.

    A map is what a convolution or a linear layer puts out after the norms, activations and sums that follow
    it, up to the first op that is no pointwise one: a pooling, or a layer that reads it. So a residual stream
    is seen after each sum. What a linear layer puts out has maps of one number.

    Args:
        context: Network, groups and images.
        images: How many images.
        see: Called once for each map and batch.

    Raises:
        ArchsearchError: If the network runs other convolutions and products than it did on its example.
    """
    left = images
    for batch, _ in context.calibration():
        mode = _Features(context.graph, see)
        with untouched(context.model, training=False), mode:
            call_model(context.model, batch[:left])
        mode.show_rest()
        left -= len(batch)
        if left <= 0:
            break


class _Features(ContractionMode):
    def __init__(self, graph: ChannelGraph, see: SeeMaps) -> None:
        super().__init__(graph)
        self._graph, self._see = graph, see
        self._open: dict[int, tuple[torch.Tensor, int, Units]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = op_name(func)
        inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        found = [self._open.pop(id(tensor)) for tensor in inputs if id(tensor) in self._open]
        goes_on = is_norm(name) or torch.Tag.pointwise in func.tags
        if not goes_on:
            self._show(found)
        result = func(*args, **(kwargs or {}))
        out: Any = next(iter(pytree.tree_leaves(result)), None)
        if goes_on and found:
            for tensor, dim, units in found:
                if tensor.shape == out.shape:  # a sum of several has the units of each
                    self._open[id(out)] = out, dim, units
                else:
                    self._show([(tensor, dim, units)])
        if name in CONTRACTIONS:
            _, op = self.next_op(name)
            for dim, atoms in op.outputs[0][1].items():
                units = self._graph.unit_of_atom[atoms]
                if (units != STAYS).any():
                    self._open[id(out)] = out, dim, units
        return result

    def show_rest(self) -> None:
        """Show the maps that nothing read."""
        with torch.no_grad():
            self._show(list(self._open.values()))
        self._open.clear()

    def _show(self, found: list[tuple[torch.Tensor, int, Units]]) -> None:
        for tensor, dim, units in found:
            maps = tensor.movedim(dim, 1)
            shape = maps.shape[2:] or (1,)
            self._see(maps.reshape(*maps.shape[:2], -1, shape[-1]), units)


class UnitMeans:
    """Means over images and channels, unit by unit.

    Args:
        graph: The channel groups.
    """

    def __init__(self, graph: ChannelGraph) -> None:
        self._graph = graph
        self._sums, self._counts = np.zeros(graph.num_units), np.zeros(graph.num_units)

    def add(self, values: torch.Tensor, units: Units) -> None:
        """Take in one value for each image and channel, ``(N, C)``."""
        goes = units != STAYS
        sums = values.sum(0, dtype=torch.float64).cpu().numpy()
        np.add.at(self._sums, units[goes], sums[goes])
        np.add.at(self._counts, units[goes], len(values))

    def scores(self) -> Scores:
        """Return the mean of each unit; infinite for groups that were never seen."""
        means = np.divide(
            self._sums, self._counts, out=np.full_like(self._sums, np.inf), where=self._counts > 0
        )
        return {
            name: means[group.first_unit : group.first_unit + group.size]
            for name, group in self._graph.groups.items()
        }
