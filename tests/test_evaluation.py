from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from archsearch.data import in_memory
from archsearch.errors import UsageError
from archsearch.training.evaluation import Split, evaluate


class Brightness(nn.Module):
    """Scores class 1 by the mean of the image, class 0 by nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((1, 2, 3))
        return torch.stack([torch.zeros_like(mean), mean], 1)


def split(values: list[float], labels: list[int]) -> Split:
    images = torch.tensor(values)[:, None, None, None].expand(-1, 1, 2, 2)
    data = in_memory(
        images,
        torch.tensor(labels),
        test=(images, torch.tensor(labels)),
        num_classes=2,
        validation_share=0.0,
        mean=[0.0],
        std=[1.0],
    )
    return data.test


def test_accuracy_is_in_percent_and_loss_the_mean_cross_entropy() -> None:
    measured = evaluate(Brightness(), split([2.0, -1.0, 3.0, -4.0], [1, 0, 0, 0]), batch_size=3, device="cpu")
    # -log softmax of the right class, by hand: the third image is wrong.
    loss = (
        math.log1p(math.exp(-2))
        + math.log1p(math.exp(-1))
        + math.log1p(math.exp(3))
        + math.log1p(math.exp(-4))
    ) / 4
    assert measured.accuracy == 75.0
    assert measured.loss == pytest.approx(loss, rel=1e-6)
    assert measured.images == 4


def test_the_network_keeps_its_mode_and_statistics() -> None:
    model = Brightness().train()
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model, split([1.0, 2.0], [0, 1]), device="cpu")
    assert model.training and not model.norm.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_empty_split_is_refused() -> None:
    class Nothing:
        def __len__(self) -> int:
            return 0

    with pytest.raises(UsageError, match="holds no image"):
        evaluate(Brightness(), Nothing(), device="cpu")
