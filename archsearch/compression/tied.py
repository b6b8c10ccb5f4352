"""Training of shared weights: all weights of a cluster move as one (Han et al., ICLR 2016, section 3.3)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from archsearch.compression.shared import Shared
from archsearch.errors import UsageError
from archsearch.training.callbacks import Callback, State


@dataclass(frozen=True)
class _Tie:
    """A parameter with the code of each weight and the place of one weight of each code."""

    parameter: nn.Parameter
    codes: Tensor
    firsts: Tensor


class TiedTraining(Callback):
    """Train the centroids of shared weights with the network's own optimiser.

    The gradient of a centroid is the sum of its members' (equation 3). Each member is given this sum: equal
    weights with equal gradients stay equal under every optimiser that treats weights one by one, but for the
    last bit, so after each step the members are set to the first of them. Pruned weights stay zero.

    Args:
        shared: By parameter name. The network starts with these very weights.
    """

    def __init__(self, shared: Mapping[str, Shared]) -> None:
        self._shared = shared
        self._ties: list[_Tie] = []

    def on_start(self, state: State) -> None:
        """Find the parameters.

        Raises:
            UsageError: If the network's are others.
        """
        parameters = dict(state.model.named_parameters())
        self._ties = []
        for name, shared in self._shared.items():
            parameter = parameters.get(name)
            if parameter is None or tuple(parameter.shape) != shared.shape:
                raise UsageError(f"shared weights: the network has no parameter {name} of {shared.shape}")
            place = parameter.device
            codes = shared.code_map().flatten().to(place)
            self._ties.append(_Tie(parameter, codes, torch.from_numpy(_firsts(shared)).to(place)))

    def after_backward(self, state: State) -> None:
        """Give each member the sum of its cluster's gradients."""
        for tie in self._ties:
            gradient = tie.parameter.grad
            if gradient is not None:
                sums = torch.zeros(len(tie.firsts) + 1, dtype=torch.float64, device=gradient.device)
                sums.index_add_(0, tie.codes, gradient.reshape(-1).double())
                sums[0] = 0
                gradient.copy_(sums[tie.codes].to(gradient.dtype).view(gradient.shape))

    def on_step(self, state: State) -> None:
        """Set the members of each cluster to the first of them."""
        with torch.no_grad():
            for tie in self._ties:
                flat = tie.parameter.reshape(-1)
                table = torch.cat([flat.new_zeros(1), flat[tie.firsts]])
                tie.parameter.copy_(table[tie.codes].view(tie.parameter.shape))


def tied_weights(model: nn.Module, shared: Mapping[str, Shared]) -> dict[str, Shared]:
    """Return the sharing with the centroids that a network was trained to."""
    parameters = dict(model.named_parameters())
    return {
        name: old.with_centroids(
            parameters[name].detach().cpu().contiguous().view(-1).numpy()[_firsts(old)].astype(np.float32)
        )
        for name, old in shared.items()
    }


def digest(shared: Mapping[str, Shared]) -> str:
    """Return the SHA-256, in hex, of which weights share: the part of a training's identity."""
    found = hashlib.sha256()
    for name, weights in shared.items():
        found.update(f"{name} {weights.shape};".encode())
        found.update(weights.codes.tobytes() + weights.places.astype("<i8").tobytes())
    return found.hexdigest()


def _firsts(shared: Shared) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return the place of the first member of each centroid, ``(k,)``."""
    return shared.places[np.unique(shared.codes, return_index=True)[1]]
