"""Norm scales: a channel is worth what its batch norm multiplies it with."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from archsearch.errors import UsageError
from archsearch.pruners.filters import rows_of
from archsearch.pruners.pruner import PRUNERS, Context, Need, Scores

_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.modules.instancenorm._InstanceNorm,
)


def norm_scales(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the scales of all norms by name."""
    return {
        f"{name}.weight" if name else "weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, _NORMS) and module.weight is not None
    }


def is_norm(op: str) -> bool:
    """Return whether an op, by its name, normalises activations."""
    return re.search("(batch|layer|group|rms)_norm", op) is not None


def scale_scores(context: Context, method: str) -> Scores:
    """Return the mean absolute scale of each unit, infinite where a group has no norm.

    Args:
        context: The network and its groups.
        method: What the user calls the method that asks.

    Raises:
        UsageError: If no group has a norm.
    """
    scales = norm_scales(context.model)
    scores = {}
    for name, group in context.graph.groups.items():
        found = [
            rows_of(scales, context.graph, group, member).abs().mean(1, dtype=torch.float64).cpu().numpy()
            for member in group.members
            if member.tensor in scales
        ]
        scores[name] = np.mean(found, axis=0) if found else np.full(group.size, np.inf)
    if all(np.isinf(worth).all() for worth in scores.values()):
        raise UsageError(f"{method}: no channel group of this network has a norm; take another --method")
    return scores


@PRUNERS.register("bn_scale")
@dataclass(frozen=True)
class NormScale:
    """Keep the channels with the largest scales of their batch norms; groups without a norm stay.

    A group with several norms, such as a residual stream, counts the mean of their scales.
    """

    source: ClassVar[str] = (
        "Liu et al., Learning Efficient ConvNets through Network Slimming, ICCV 2017, section 3"
    )
    allocation: ClassVar[str] = "threshold"
    needs: ClassVar[tuple[Need, ...]] = ()

    def score(self, context: Context) -> Scores:
        """Return the mean absolute scale of each unit, infinite where a group has no norm.

        Raises:
            UsageError: If no group has a norm.
        """
        return scale_scores(context, "bn_scale")
