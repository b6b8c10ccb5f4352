"""Network slimming: an L1 penalty on the scales of norms while the reference trains, then one threshold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from archsearch.errors import UsageError
from archsearch.graph import STAYS, ChannelGraph
from archsearch.pruners.norm_scale import norm_scales, scale_scores
from archsearch.pruners.pruner import PRUNERS, Context, Need, Scores, SparseTraining
from archsearch.training.callbacks import Callback, State


class ScalePenalty(Callback):
    """Add the subgradient of ``strength * |gamma|`` to the gradients of scales that may go.

    It is the same in every process of a data-parallel training, whose gradients are averaged before.

    Args:
        prunable: Which entries of each scale belong to a unit, by the scale's name.
        strength: Of the penalty.
    """

    def __init__(self, prunable: Mapping[str, torch.Tensor], strength: float) -> None:
        self._prunable, self._strength = prunable, strength

    def after_backward(self, state: State) -> None:
        """Add the subgradient; that of zero is zero."""
        for name, prunable in self._prunable.items():
            scale = state.model.get_parameter(name)
            if scale.grad is not None:
                push = scale.detach().sign() * prunable.to(scale.device)
                scale.grad.add_(push, alpha=self._strength)


@PRUNERS.register("slimming")
@dataclass(frozen=True)
class Slimming:
    """Keep the channels with the largest norm scales, after a training that shrinks scales.

    Args:
        strength: Of the L1 penalty on the scales, ``lambda`` in the paper.
    """

    strength: float = 1e-4

    source: ClassVar[str] = (
        "Liu et al., Learning Efficient ConvNets through Network Slimming, ICCV 2017, section 3, equation 1"
    )
    allocation: ClassVar[str] = "threshold"
    needs: ClassVar[tuple[Need, ...]] = ("sparse training",)

    def __post_init__(self) -> None:
        if not 0 < self.strength < float("inf"):
            raise UsageError(f"slimming: strength is {self.strength}: it must be above 0 and finite")

    def sparse_training(
        self, model: nn.Module, graph: ChannelGraph, widths: Mapping[str, int]
    ) -> SparseTraining:
        """Train the reference itself, with the penalty on the scales of all prunable channels.

        Raises:
            UsageError: If no group has a norm.
        """
        scale_scores(Context(model, graph), "slimming")
        prunable = {
            name: torch.from_numpy(units != STAYS)
            for name in norm_scales(model)
            if (units := graph.units.get((name, 0))) is not None and (units != STAYS).any()
        }
        return SparseTraining(model, [ScalePenalty(prunable, self.strength)], lambda: model)

    def score(self, context: Context) -> Scores:
        """Return the mean absolute scale of each unit, infinite where a group has no norm.

        Raises:
            UsageError: If no group has a norm.
        """
        return scale_scores(context, "slimming")
