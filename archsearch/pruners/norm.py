"""Filter norms: a channel is worth the size of the weights that compute it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from archsearch.graph import STAYS
from archsearch.pruners.pruner import PRUNERS, Context, Scores


def filter_norms(context: Context, p: int) -> Scores:
    """Return the p-norm of each unit's filters, over all layers that produce its group.

    A filter is one slice of a producer along its output dimension; biases and norms do not count.
    """
    tensors = dict(context.model.named_parameters())
    scores = {}
    for name, group in context.graph.groups.items():
        total = np.zeros(group.size)
        for member in group.producers:
            weight = tensors[member.tensor].detach()
            others = [dim for dim in range(weight.dim()) if dim != member.dim]
            magnitudes = weight.abs() if p == 1 else weight.abs().pow(p)
            powers = magnitudes.sum(others, dtype=torch.float64).cpu().numpy()
            units = context.graph.units[member.tensor, member.dim]
            mine = (units >= group.first_unit) & (units < group.first_unit + group.size) & (units != STAYS)
            np.add.at(total, units[mine] - group.first_unit, powers[mine])
        scores[name] = total ** (1 / p)
    return scores


@PRUNERS.register("l1_norm")
@dataclass(frozen=True)
class L1Norm:
    """Keep the filters with the largest sum of absolute weights."""

    source: ClassVar[str] = "Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, section 3.1"
    allocation: ClassVar[str] = "global"

    def score(self, context: Context) -> Scores:
        """Return the L1 norm of each unit's filters."""
        return filter_norms(context, 1)


@PRUNERS.register("l2_norm")
@dataclass(frozen=True)
class L2Norm:
    """Keep the filters with the largest Euclidean norm."""

    source: ClassVar[str] = "He et al., Soft Filter Pruning, IJCAI 2018, section 3.2, one-shot"
    allocation: ClassVar[str] = "global"

    def score(self, context: Context) -> Scores:
        """Return the L2 norm of each unit's filters."""
        return filter_norms(context, 2)
