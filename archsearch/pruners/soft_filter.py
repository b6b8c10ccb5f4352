"""Soft filter pruning: the weakest filters are zeroed after every epoch, and may grow again in the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from archsearch.allocation import select
from archsearch.graph import ChannelGraph
from archsearch.pruners.norm import filter_norms
from archsearch.pruners.pruner import PRUNERS, Context, Need, Scores, SparseTraining
from archsearch.training.callbacks import Callback, State


class SoftZeros(Callback):
    """Zero the filters of smallest Euclidean norm in each group at the end of every epoch.

    It happens in the last step, so that the validation and the checkpoint see the zeros.

    Args:
        graph: The channel groups.
        widths: How many units of each group keep their filters.
    """

    def __init__(self, graph: ChannelGraph, widths: Mapping[str, int]) -> None:
        self._graph, self._widths = graph, widths

    def on_step(self, state: State) -> None:
        """Zero filters if this was the last step of an epoch."""
        if state.batch == state.batches:
            zero_weakest(state.model, self._graph, self._widths)


@torch.no_grad()
def zero_weakest(model: nn.Module, graph: ChannelGraph, widths: Mapping[str, int]) -> None:
    """Zero the filters of all but the ``widths`` units of largest norm; biases and norms stay."""
    kept = graph.kept_units(select(filter_norms(Context(model, graph), 2), widths))
    parameters = dict(model.named_parameters())
    filters = {(m.tensor, m.dim) for group in graph.groups.values() for m in group.producers}
    for name, dim in sorted(filters):
        if name in parameters:
            dropped = torch.from_numpy(np.flatnonzero(~kept[graph.units[name, dim]]))
            parameters[name].index_fill_(dim, dropped.to(parameters[name].device), 0)


@PRUNERS.register("soft_filter")
@dataclass(frozen=True)
class SoftFilter:
    """Keep the filters with the largest Euclidean norm, after a training that zeroes the others softly."""

    source: ClassVar[str] = "He et al., Soft Filter Pruning, IJCAI 2018, section 3.2, algorithm 1"
    allocation: ClassVar[str] = "local"
    needs: ClassVar[tuple[Need, ...]] = ("sparse training",)

    def sparse_training(
        self, model: nn.Module, graph: ChannelGraph, widths: Mapping[str, int]
    ) -> SparseTraining:
        """Train the reference itself, with all but the widths zeroed after every epoch."""
        identity = {"widths": dict(widths)}
        return SparseTraining(model, [SoftZeros(graph, widths)], lambda: model, identity)

    def score(self, context: Context) -> Scores:
        """Return the L2 norm of each unit's filters."""
        return filter_norms(context, 2)
