"""Geometric median: a filter near all others can be replaced by them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from archsearch.pruners.filters import filters
from archsearch.pruners.pruner import PRUNERS, Context, Need, Scores
from archsearch.tracing import model_tensors


@PRUNERS.register("fpgm")
@dataclass(frozen=True)
class Fpgm:
    """Keep the filters that are farthest from the geometric median of their layer."""

    source: ClassVar[str] = "He et al., Filter Pruning via Geometric Median, CVPR 2019, equation 6"
    allocation: ClassVar[str] = "local"
    needs: ClassVar[tuple[Need, ...]] = ()

    def score(self, context: Context) -> Scores:
        """Return the sum of each filter's Euclidean distances to all others of its group.

        A group without filters stays: its scores are infinite.
        """
        tensors = model_tensors(context.model)
        scores = {}
        for name, group in context.graph.groups.items():
            squared = torch.zeros(group.size, group.size, dtype=torch.float64)
            found = list(filters(tensors, context.graph, group))
            if not found:
                scores[name] = np.full(group.size, np.inf)
                continue
            for rows in found:
                rows = rows.double()  # small distances are small differences of large squares
                gram = (rows @ rows.T).cpu()
                norms = gram.diagonal()
                squared += norms[:, None] + norms[None, :] - 2 * gram
            squared.fill_diagonal_(0)
            scores[name] = squared.clamp_min(0).sqrt().sum(1).numpy()
        return scores
