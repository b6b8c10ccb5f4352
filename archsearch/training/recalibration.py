"""Fresh statistics for batch norms whose inputs have changed."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn


def recalibrate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], count: int = 100) -> None:
    """Replace the running statistics of a network's batch norms by those of some batches.

    Without its dropped channels a network's layers see other means and variances than their norms hold; one
    pass over training images sets that right and trains nothing (Li et al., EagleEye, ECCV 2020,
    section 3.3). A batch counts as much as any other.

    Args:
        model: Is changed; its mode is not, nor the global random state.
        batches: Training images and labels.
        count: Most batches to look at.
    """
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # dropout draws in this pass
        update_bn(itertools.islice(batches, count), model, device=device)
