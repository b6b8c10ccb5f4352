"""Filter norms: a channel is worth the size of the weights that compute it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from archsearch.pruners.filters import filters
from archsearch.pruners.pruner import PRUNERS, Context, Need, Scores
from archsearch.tracing import model_tensors


def filter_norms(context: Context, p: int) -> Scores:
    """Return the p-norm of each unit's filters, over all layers that produce its group.

    A filter is one slice of a producer along its output dimension; biases and norms do not count. A group
    without filters stays: its scores are infinite.
    """
    tensors = model_tensors(context.model)
    scores = {}
    for name, group in context.graph.groups.items():
        sums = [
            rows.abs().pow(p).sum(1, dtype=torch.float64).cpu()
            for rows in filters(tensors, context.graph, group)
        ]
        total = torch.stack(sums).sum(0) if sums else torch.full((group.size,), torch.inf)
        scores[name] = (total ** (1 / p)).double().numpy()
    return scores


@PRUNERS.register("l1_norm")
@dataclass(frozen=True)
class L1Norm:
    """Keep the filters with the largest sum of absolute weights."""

    source: ClassVar[str] = "Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, section 3.1"
    allocation: ClassVar[str] = "global"
    needs: ClassVar[tuple[Need, ...]] = ()

    def score(self, context: Context) -> Scores:
        """Return the L1 norm of each unit's filters."""
        return filter_norms(context, 1)


@PRUNERS.register("l2_norm")
@dataclass(frozen=True)
class L2Norm:
    """Keep the filters with the largest Euclidean norm."""

    source: ClassVar[str] = "He et al., Soft Filter Pruning, IJCAI 2018, section 3.2, one-shot"
    allocation: ClassVar[str] = "global"
    needs: ClassVar[tuple[Need, ...]] = ()

    def score(self, context: Context) -> Scores:
        """Return the L2 norm of each unit's filters."""
        return filter_norms(context, 2)
