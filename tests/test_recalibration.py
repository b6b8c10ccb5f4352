from __future__ import annotations

import torch
from torch import nn

from archsearch.training.recalibration import recalibrate


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(3)
    return [(torch.randn(8, 2, 5, 5, generator=draw) * 3 + 1, torch.zeros(8)) for _ in range(4)]


def test_statistics_are_the_mean_over_batches_and_nothing_else_changes() -> None:
    norm = nn.BatchNorm2d(2)
    model = nn.Sequential(norm, nn.Dropout(0.5), nn.Conv2d(2, 3, 1)).eval()
    with torch.no_grad():
        norm.running_mean.fill_(7)  # type: ignore[union-attr]
    weights = {name: tensor.clone() for name, tensor in model.named_parameters()}
    state = torch.get_rng_state()
    recalibrate(model, batches())
    images = [image for image, _ in batches()]
    means = torch.stack([image.mean((0, 2, 3)) for image in images]).mean(0)
    variances = torch.stack([image.transpose(0, 1).flatten(1).var(1) for image in images]).mean(0)
    torch.testing.assert_close(norm.running_mean, means)
    torch.testing.assert_close(norm.running_var, variances)
    assert norm.momentum == 0.1
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_no_more_batches_are_looked_at_than_asked_for() -> None:
    norm = nn.BatchNorm2d(2)
    recalibrate(norm, batches(), count=1)
    torch.testing.assert_close(norm.running_mean, batches()[0][0].mean((0, 2, 3)))
