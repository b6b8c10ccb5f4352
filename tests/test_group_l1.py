from __future__ import annotations

import numpy as np
import pytest
import torch
from networks import NETWORKS
from torch import nn

from archsearch.grouping import channel_graph
from archsearch.models import resolve
from archsearch.pruners import Context
from archsearch.pruners.group_l1 import GroupL1, UnitNorms
from archsearch.training.callbacks import State


def push(model: nn.Module, example: torch.Tensor, strength: float) -> dict[str, torch.Tensor]:
    """Return what one step of the callback adds to the gradients."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    graph = channel_graph(model, example)
    (callback,) = GroupL1(strength).sparse_training(model, graph, graph.sizes).callbacks
    callback.after_backward(State(model, epochs=1, batches=1))
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_the_push_and_the_norms_worked_out_by_hand() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 4.0], [1.0, 0.0]]))
        model[0].bias.fill_(100)  # does not count, and is not pushed
        model[2].weight.copy_(torch.tensor([[4.0, 0.0, 0.0], [0.0, 3.0, 0.0]]))
    # Norms are 5, 5 and 1, so that the weakest gets 2^4.
    found = push(model, torch.randn(1, 2), 0.5)
    assert found["0.weight"].tolist() == [[1.5, 0], [0, 2], [8, 0]]
    assert found["2.weight"].tolist() == [[2, 0, 0], [0, 1.5, 0]]
    assert not found["0.bias"].any() and not found["2.bias"].any()
    graph = channel_graph(model, torch.randn(1, 2))
    assert GroupL1().score(Context(model, graph))["0"].tolist() == pytest.approx([5, 5, 1])


def test_where_all_units_are_equal_each_is_pushed_as_by_weight_decay() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    for parameter in model.parameters():
        nn.init.constant_(parameter, 2.0)
    found = push(model, torch.randn(1, 2), 0.25)
    assert (found["0.weight"] == 0.5).all() and (found["2.weight"] == 0.5).all()


@pytest.mark.parametrize("name", ["Chain", "Residual", "Concat", "Flattened", "Grouped", "SharedParameter"])
def test_norms_unit_by_unit(name: str) -> None:
    """All weights that fall away with a unit, slice by slice; a weight in two of its slices counts twice."""
    network = NETWORKS[name]
    model = network.build()
    graph = channel_graph(model, network.example())
    scores = GroupL1().score(Context(model, graph))
    tensors = dict(model.named_parameters())
    for group in graph.groups.values():
        for unit in range(group.size):
            square = 0.0
            for member in group.members:
                if member.tensor.endswith("weight"):
                    mine = np.flatnonzero(graph.units[member.tensor, member.dim] == group.first_unit + unit)
                    weight = tensors[member.tensor].detach().double()
                    square += float(weight.index_select(member.dim, torch.from_numpy(mine)).square().sum())
            assert scores[group.name][unit] == pytest.approx(square**0.5, rel=1e-5)


def test_a_step_of_the_penalty_is_torch_prunings() -> None:
    import torch_pruning as tp

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = resolve("resnet56").build(shortcut="projection").eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight)
    example = torch.randn(1, 3, 32, 32)
    ours = push(model, example, 5e-4)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    heads = [module for module in model.modules() if isinstance(module, nn.Linear)]
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    pruner = tp.pruner.GroupNormPruner(model, example, importance, reg=5e-4, ignored_layers=heads)
    pruner.regularize(model)
    pushed = 0
    for name, parameter in model.named_parameters():
        theirs = parameter.grad
        assert theirs is not None
        torch.testing.assert_close(ours[name], theirs, rtol=1e-4, atol=1e-9)
        pushed += bool(theirs.any())
    assert pushed > 100

    graph = channel_graph(model, example)
    norms = UnitNorms(model, graph).of(model)
    for group in graph.groups.values():
        peers = tp.DependencyGraph().build_dependency(model, example)
        conv = model.get_submodule(group.name)
        whole = peers.get_pruning_group(conv, tp.prune_conv_out_channels, list(range(group.size)))
        summed = tp.importance.GroupMagnitudeImportance(p=2, group_reduction="sum", normalizer=None)
        own = norms[group.first_unit : group.first_unit + group.size]
        torch.testing.assert_close(own, summed(whole).sqrt(), rtol=1e-5, atol=0)
        if group.first_unit > 100:
            break
