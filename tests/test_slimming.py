from __future__ import annotations

from typing import Any

import pytest
import sparse_case as case
import torch
from networks import NETWORKS
from torch import nn
from torch.nn import functional as F
from training_case import RECIPE, network, source

from archsearch.errors import UsageError
from archsearch.grouping import channel_graph
from archsearch.models import resolve
from archsearch.pruners.slimming import Slimming
from archsearch.training.callbacks import State
from archsearch.training.loop import train


def pushed(name: str, strength: float) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return a network with random scales, and what the callback adds to the gradient of each parameter."""
    model = NETWORKS[name].build()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    graph = channel_graph(model, NETWORKS[name].example())
    (callback,) = Slimming(strength).sparse_training(model, graph, graph.sizes).callbacks
    callback.after_backward(State(model, epochs=1, batches=1))
    return model, {name: parameter.grad for name, parameter in model.named_parameters()}


def penalised(model: nn.Module, scales: list[str], strength: float) -> dict[str, torch.Tensor]:
    """Return the gradient of the penalty by autograd."""
    parameters = dict(model.named_parameters())
    (strength * sum(parameters[name].abs().sum() for name in scales)).backward()
    return {name: parameter.grad for name, parameter in parameters.items()}


@pytest.mark.parametrize(
    ("name", "scales"),
    [
        ("Chain", ["bn1.weight", "bn2.weight"]),
        ("Residual", ["bn0.weight", "bn1.weight", "bn2.weight"]),
        ("Concat", ["bn.weight"]),
        ("Gathering", ["bn1.weight", "bn2.weight", "bn.weight"]),  # norms that only their readers follow
    ],
)
def test_the_callback_adds_the_gradient_of_the_l1_norm_of_the_scales(name: str, scales: list[str]) -> None:
    model, found = pushed(name, 0.25)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    expected = penalised(model, scales, 0.25)
    assert all(torch.equal(found[parameter], expected[parameter]) for parameter in expected)
    assert any(gradient.any() for gradient in found.values())


def test_scales_of_channels_that_stay_are_not_pushed_and_a_scale_of_zero_neither() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.Flatten()
    )
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([2.0, -3.0, 0.0, 1.0]))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    graph = channel_graph(model, torch.randn(2, 3, 5, 5))
    (callback,) = Slimming(0.5).sparse_training(model, graph, graph.sizes).callbacks
    callback.after_backward(State(model, epochs=1, batches=1))
    assert model[1].weight.grad.tolist() == [1.5, 0.5, 1, 1.5]
    assert (model[3].weight.grad == 1).all()  # the network's own outputs
    assert all((p.grad == 1).all() for n, p in model.named_parameters() if n != "1.weight")


@pytest.mark.parametrize(
    ("name", "channels"), [("vgg19", 5504), ("preresnet164", 12112), ("densenet40", 9360)]
)
def test_as_many_channels_are_pushed_as_published_configurations_have(name: str, channels: int) -> None:
    """The totals over which Liu et al. (ICLR 2019) sort the scales of their released configurations."""
    model = resolve(name).build()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    graph = channel_graph(model, torch.randn(1, 3, 32, 32))
    (callback,) = Slimming().sparse_training(model, graph, graph.sizes).callbacks
    callback.after_backward(State(model, epochs=1, batches=1))
    pushed = [int((p.grad != 0).sum()) for p in model.parameters() if p.grad is not None]
    assert sum(pushed) == channels


def test_a_training_ends_as_with_the_penalty_in_the_loss() -> None:
    plain, sparse = network(dropout=0.0), network(dropout=0.0)
    data = source()
    graph = channel_graph(sparse, case.EXAMPLE)
    training = Slimming(0.01).sparse_training(sparse, graph, graph.sizes)
    case.run(training, epochs=2)
    scale: Any = plain[1]

    def penalty(model: nn.Module) -> torch.Tensor:
        return F.l1_loss(scale.weight, torch.zeros_like(scale.weight), reduction="sum") * 0.01

    train(plain, data.train, data.validation, RECIPE, epochs=2, device="cpu", penalty=penalty)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(sparse.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)


def test_a_network_without_norms_is_refused_before_it_is_trained() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    graph = channel_graph(model, case.EXAMPLE)
    with pytest.raises(UsageError, match="slimming: no channel group of this network has a norm"):
        Slimming().sparse_training(model, graph, graph.sizes)
