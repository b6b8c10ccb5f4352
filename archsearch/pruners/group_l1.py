"""Group sparsity over all parameters of a unit: what is small is pushed to zero harder.

The name says what the penalty is for: as an L1 norm drives single weights to zero, it drives whole units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from archsearch.errors import UsageError
from archsearch.graph import STAYS, ChannelGraph
from archsearch.pruners.norm_scale import norm_scales
from archsearch.pruners.pruner import PRUNERS, Context, Need, Scores, SparseTraining
from archsearch.training.callbacks import Callback, State

SPREAD = 4.0  # the weakest unit of a group is pushed 2^4 times as hard as the strongest: section 3.3


class UnitNorms:
    """The Euclidean norm of each unit over all its slices of weights and norm scales, made and read.

    Biases and the shifts of norms do not count.

    Args:
        model: The network of the graph.
        graph: Its channel groups.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph) -> None:
        scales, parameters = norm_scales(model), dict(model.named_parameters())
        places = {
            (member.tensor, member.dim): graph.units[member.tensor, member.dim]
            for group in graph.groups.values()
            for member in group.members
            if member.tensor in scales
            or (member.tensor in parameters and member in (*group.producers, *group.consumers))
        }
        # What stays is counted as one more unit, of a group of its own.
        self._units = {
            place: torch.from_numpy(np.where(units == STAYS, graph.num_units, units))
            for place, units in places.items()
        }
        sizes = [*graph.sizes.values(), 1]
        self._group_of_unit = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes))
        self._groups = len(sizes)

    def of(self, model: nn.Module) -> torch.Tensor:
        """Return the norm of each unit of the graph, and last of what stays, ``(num_units + 1,)``."""
        parameters = dict(model.named_parameters())
        like = next(model.parameters())
        squares = torch.zeros(len(self._group_of_unit), dtype=like.dtype, device=like.device)
        for (name, dim), units in self._units.items():
            own = parameters[name].detach().square().movedim(dim, 0).reshape(len(units), -1).sum(1)
            squares.index_add_(0, units.to(own.device), own)
        return squares.sqrt()

    def push(self, model: nn.Module, strength: float) -> None:
        """Add the gradient of the penalty to the gradients of the parameters.

        The penalty is half of ``strength * sum over units k of alpha_k * |unit k|^2``, with
        ``alpha_k = 2^(4 (max - I_k) / (max - min))`` and ``I`` the norms of the units of one group (Fang et
        al., CVPR 2023, section 3.3). ``alpha`` counts as constant.
        """
        norms = self.of(model)
        group = self._group_of_unit.to(norms.device)
        most = norms.new_zeros(self._groups).scatter_reduce(0, group, norms, "amax", include_self=False)
        least = norms.new_zeros(self._groups).scatter_reduce(0, group, norms, "amin", include_self=False)
        # Where all units of a group are equal, none is weaker than another.
        spread = (most - least).clamp_min(torch.finfo(norms.dtype).tiny)
        alpha = 2 ** (SPREAD * (most[group] - norms) / spread[group])
        alpha[-1] = 0  # what stays is not pushed
        parameters = dict(model.named_parameters())
        for (name, dim), units in self._units.items():
            weight = parameters[name]
            if weight.grad is not None:
                factors = alpha[units.to(alpha.device)].reshape(-1, *[1] * (weight.dim() - dim - 1))
                weight.grad.addcmul_(weight.detach(), factors, value=strength)


class GroupPenalty(Callback):
    """Add the gradient of the group penalty, the same in every process, to the gradients.

    Args:
        norms: Of the units of the trained network.
        strength: Of the penalty.
    """

    def __init__(self, norms: UnitNorms, strength: float) -> None:
        self._norms, self._strength = norms, strength

    def after_backward(self, state: State) -> None:
        """Push every unit, the weaker ones harder."""
        self._norms.push(state.model, self._strength)


@PRUNERS.register("group_l1")
@dataclass(frozen=True)
class GroupL1:
    """Keep the units with the largest norm of all their parameters, after a training that shrinks the small.

    Args:
        strength: Of the penalty.
    """

    strength: float = 5e-4

    source: ClassVar[str] = "Fang et al., DepGraph, CVPR 2023, section 3.3"
    allocation: ClassVar[str] = "global"
    needs: ClassVar[tuple[Need, ...]] = ("sparse training",)

    def __post_init__(self) -> None:
        if not 0 < self.strength < float("inf"):
            raise UsageError(f"group_l1: strength is {self.strength}: it must be above 0 and finite")

    def sparse_training(
        self, model: nn.Module, graph: ChannelGraph, widths: Mapping[str, int]
    ) -> SparseTraining:
        """Train the reference itself, with the penalty on all units."""
        penalty = GroupPenalty(UnitNorms(model, graph), self.strength)
        return SparseTraining(model, [penalty], lambda: model)

    def score(self, context: Context) -> Scores:
        """Return the norm of each unit over all its weights and norm scales."""
        norms = UnitNorms(context.model, context.graph).of(context.model).double().cpu().numpy()
        return {
            name: norms[group.first_unit : group.first_unit + group.size]
            for name, group in context.graph.groups.items()
        }
