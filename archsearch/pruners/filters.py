"""The weights of a group's channels, one row a unit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from archsearch.graph import ChannelGraph, ChannelGroup, Member


def rows_of(
    tensors: Mapping[str, torch.Tensor], graph: ChannelGraph, group: ChannelGroup, member: Member
) -> torch.Tensor:
    """Return the slices of one member, ``(size, count * others)``: a row is what a unit owns of it."""
    units = graph.units[member.tensor, member.dim] - group.first_unit
    mine = np.flatnonzero((units >= 0) & (units < group.size))
    order = mine[np.argsort(units[mine], kind="stable")]
    tensor = tensors[member.tensor].detach()
    rows = tensor.movedim(member.dim, 0)[torch.from_numpy(order).to(tensor.device)]
    return rows.reshape(group.size, -1)


def filters(
    tensors: Mapping[str, torch.Tensor], graph: ChannelGraph, group: ChannelGroup
) -> Iterator[torch.Tensor]:
    """Return the filters of each layer that produces a group, ``(size, weights of a filter)``.

    None where no weights do: a norm that gathers selects channels, it computes none.
    """
    for member in group.producers:
        if tensors[member.tensor].is_floating_point():
            yield rows_of(tensors, graph, group, member)
