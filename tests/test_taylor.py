from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from networks import NETWORKS
from torch import nn

from archsearch.errors import UsageError
from archsearch.grouping import channel_graph
from archsearch.pruners import Context
from archsearch.pruners.taylor import Taylor

W1 = np.array([[1.0, 2.0], [-1.0, 0.5], [0.0, 3.0]])
W2 = np.array([[0.5, -1.0, 0.25], [1.0, 2.0, -0.5]])


def linear_pair() -> Any:
    """Two linear layers without anything between: logits are ``W2 W1 x``."""
    model: Any = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.from_numpy(W1))
        model[1].weight.copy_(torch.from_numpy(W2))
    return model


def by_hand(x: Any, labels: list[int]) -> Any:
    """Return the scores: to first order the loss falls by ``e' W2[:, u] (W1 x)[u]`` without unit ``u``.

    ``e`` is the softmax less the label. Both layers of the unit say so, hence twice.
    """
    hidden = x @ W1.T
    logits = hidden @ W2.T
    softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    error = (softmax - np.eye(2)[labels]) / len(labels)
    return np.square(2 * ((error @ W2) * hidden).sum(0))


def test_the_gradient_of_a_tiny_linear_network_worked_out_by_hand() -> None:
    model = linear_pair()
    first, second = np.array([[0.3, -0.2], [0.1, 0.4]]), np.array([[-0.5, 0.2]])
    batches = [
        (torch.tensor(first).float(), torch.tensor([0, 1])),
        (torch.tensor(second).float(), torch.tensor([1])),
    ]
    context = Context(model, channel_graph(model, torch.randn(1, 2)), batches=lambda: batches)
    one, two = by_hand(first, [0, 1]), by_hand(second, [1])
    assert Taylor().score(context)["0"] == pytest.approx((one + two) / 2, rel=1e-5)
    assert Taylor(batches=1).score(context)["0"] == pytest.approx(one, rel=1e-5)


def test_small_gates_change_the_loss_as_the_scores_say() -> None:
    """Against finite differences: both tensors of a unit made smaller by a small share."""
    model = linear_pair().double()
    x, labels = torch.randn(8, 2, dtype=torch.float64), torch.randint(2, (8,))
    context = Context(model, channel_graph(model, x[:1]), batches=lambda: [(x, labels)])
    scores = Taylor().score(context)["0"]
    share = 1e-6
    for unit in range(3):
        with torch.no_grad():
            before = nn.functional.cross_entropy(model(x), labels)
            for layer, index in ((model[0], unit), (model[1], (slice(None), unit))):
                layer.weight[index] *= 1 - share
            after = nn.functional.cross_entropy(model(x), labels)
            for layer, index in ((model[0], unit), (model[1], (slice(None), unit))):
                layer.weight[index] /= 1 - share
        assert scores[unit] == pytest.approx(((before - after) / share).item() ** 2, rel=1e-3, abs=1e-9)


def test_frozen_parameters_count_and_gradients_that_are_there_stay() -> None:
    network = NETWORKS["Chain"]
    images, labels = torch.randn(6, 3, 8, 8), torch.randint(10, (6,))
    model = network.build()
    context = Context(model, channel_graph(model, images[:1]), batches=lambda: [(images, labels)])
    free = Taylor().score(context)
    model.requires_grad_(False)
    model.fc.weight.requires_grad_(True)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    frozen = Taylor().score(context)
    assert all(np.array_equal(free[name], frozen[name]) for name in free)
    assert torch.equal(model.fc.weight.grad, torch.ones_like(model.fc.weight))
    assert all(p.grad is None for n, p in model.named_parameters() if n != "fc.weight")


def test_outputs_that_are_no_class_scores_are_refused() -> None:
    model = NETWORKS["Transposed"].build()
    images = torch.randn(2, 3, 8, 8)
    context = Context(
        model, channel_graph(model, images[:1]), batches=lambda: [(images, torch.tensor([0, 1]))]
    )
    with pytest.raises(UsageError, match=r"taylor: .* \(2, 3, 8, 8\), but the loss needs class scores"):
        Taylor().score(context)
