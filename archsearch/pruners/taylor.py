"""First-order Taylor expansion: how much the loss would change without a channel."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from archsearch.allocation import Curves
from archsearch.errors import UsageError
from archsearch.pruners.curves import best_first
from archsearch.pruners.filters import rows_of
from archsearch.pruners.pruner import PRUNERS, Context, Need, Scores
from archsearch.tracing import output_tensors, untouched


@PRUNERS.register("taylor")
@dataclass(frozen=True)
class Taylor:
    """Keep the channels whose removal would change the loss most, to first order.

    A unit is a set of parameters that go together: the change of the loss is the sum of gradient times weight
    over all of them, and its square, averaged over batches, the importance.

    Args:
        batches: Calibration batches.
    """

    batches: int = 10

    source: ClassVar[str] = (
        "Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019, section 3.1"
    )
    allocation: ClassVar[str] = "threshold"
    needs: ClassVar[tuple[Need, ...]] = ("images", "labels", "gradients")

    def __post_init__(self) -> None:
        if self.batches < 1:
            raise UsageError(f"taylor: batches is {self.batches}: it must be 1 or more")

    def score(self, context: Context) -> Scores:
        """Return the mean squared first-order change of the loss without each unit.

        Raises:
            UsageError: If the network's first output holds no class scores, ``(N, classes)``.
        """
        return {name: np.square(changes).mean(0) for name, changes in self._unit_changes(context).items()}

    def curves(self, context: Context, scores: Scores) -> Curves:
        """Return the same for all dropped units together: their changes add up before they are squared."""
        found = {}
        for name, changes in self._unit_changes(context).items():
            worst_last = changes[:, best_first(scores[name])]
            dropped = np.square(worst_last[:, ::-1].cumsum(1)).mean(0)
            found[name] = np.concatenate([[0.0], dropped])[::-1]
        return found

    def _unit_changes(self, context: Context) -> dict[str, npt.NDArray[np.float64]]:
        """Return each unit's first-order change of the loss on each batch, ``(B, size)``."""
        graph = context.graph
        found: dict[str, list[npt.NDArray[np.float64]]] = {name: [] for name in graph.groups}
        for images, labels in itertools.islice(context.calibration(), self.batches):
            changes = _changes(context.model, images, labels)
            for name, group in graph.groups.items():
                change = torch.zeros(group.size, dtype=torch.float64)
                for member in group.members:
                    if member.tensor in changes:
                        change += rows_of(changes, graph, group, member).sum(1, dtype=torch.float64).cpu()
                found[name].append(change.numpy())
        return {name: np.stack(changes) for name, changes in found.items()}


def _changes(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return each parameter times its gradient: what the loss would lose with it, to first order.

    Also of frozen parameters; the model's own gradients stay as they are.
    """
    parameters = {name: tensor.detach().requires_grad_() for name, tensor in model.named_parameters()}
    with untouched(model, training=False), torch.enable_grad():
        scores = output_tensors(functional_call(model, parameters, (images,)))[0]
        if scores.dim() != 2:
            raise UsageError(
                f"taylor: the network's first output has shape {tuple(scores.shape)}, but the loss needs "
                "class scores, (N, classes): take another --method"
            )
        loss = F.cross_entropy(scores, labels)
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        name: parameter.detach() * gradient
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
        if gradient is not None
    }
