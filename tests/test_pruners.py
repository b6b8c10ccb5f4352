from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from networks import NETWORKS, Network
from torch import nn

from archsearch.allocation import ALLOCATIONS, select, solve
from archsearch.cost import CostModel
from archsearch.grouping import channel_graph
from archsearch.pruners import PRUNERS, Context, Scores
from archsearch.space import SearchSpace
from archsearch.targets import Target

pruners = pytest.mark.parametrize("pruner", list(PRUNERS))
networks = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS.keys())


def context_of(network: Network, seed: int = 0) -> Context:
    model = network.build()
    return Context(model, channel_graph(model, network.example()), seed)


def score(pruner: str, context: Context) -> Scores:
    return PRUNERS[pruner]().score(context)


# --- what holds for every pruner ------------------------------------------------------------------------


@pruners
@networks
def test_every_unit_of_every_group_has_a_finite_score(pruner: str, network: Network) -> None:
    context = context_of(network)
    scores = score(pruner, context)
    assert list(scores) == list(context.graph.groups)
    for name, size in context.graph.sizes.items():
        assert scores[name].shape == (size,) and scores[name].dtype == np.float64
        assert np.isfinite(scores[name]).all()


@pruners
def test_the_same_seed_has_the_same_scores_and_the_global_random_state_no_part(pruner: str) -> None:
    first = score(pruner, context_of(NETWORKS["Chain"], seed=3))
    torch.manual_seed(99)
    np.random.seed(99)
    state = torch.get_rng_state()
    second = score(pruner, context_of(NETWORKS["Chain"], seed=3))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pruners
def test_scoring_changes_nothing_of_the_model(pruner: str) -> None:
    context = context_of(NETWORKS["InvertedBottleneck"])
    before = {name: tensor.clone() for name, tensor in context.model.state_dict().items()}
    modes = [module.training for module in context.model.modules()]
    units = context.graph.units
    score(pruner, context)
    assert all(torch.equal(tensor, before[name]) for name, tensor in context.model.state_dict().items())
    assert [module.training for module in context.model.modules()] == modes
    assert all(parameter.grad is None for parameter in context.model.parameters())
    assert context.graph.units is units


@pruners
@pytest.mark.parametrize("name", ["Chain", "Residual", "Attention"])
def test_a_larger_target_keeps_no_less_of_the_network_and_at_least_one_channel_of_each_group(
    pruner: str, name: str
) -> None:
    context = context_of(NETWORKS[name])
    cost = CostModel(context.model, context.graph)
    scores = score(pruner, context)
    priorities = ALLOCATIONS[PRUNERS[pruner].allocation](scores)
    allowed = SearchSpace().allowed(context.graph)
    costs = []
    for keep in (0.3, 0.5, 0.7, 1.0):
        widths = solve(cost, priorities, allowed, [Target.parse("flops", keep)])
        kept = select(scores, widths)
        assert all(1 <= len(kept[group]) == widths[group] for group in widths)
        costs.append(cost.of(widths).macs)
    assert costs == sorted(costs)
    assert costs[-1] == cost.reference.macs


@pruners
def test_a_pruner_says_where_it_is_from_and_which_allocation_it_is_published_with(pruner: str) -> None:
    kind = PRUNERS[pruner]
    assert len(kind.source) > 10
    assert kind.allocation in ALLOCATIONS
    assert kind.__doc__


@pruners
def test_a_pruner_is_frozen_and_compares_by_its_hyper_parameters(pruner: str) -> None:
    one = PRUNERS[pruner]()
    assert one == PRUNERS[pruner]()
    with pytest.raises(AttributeError):
        one.anything = 1  # type: ignore[attr-defined]


# --- each against numbers worked out otherwise ----------------------------------------------------------


def test_norms_of_filters_worked_out_by_hand() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, -4.0], [0.0, 1.0], [-2.0, 2.0]]))
        model[0].bias.fill_(100)  # does not count
    context = Context(model, channel_graph(model, torch.randn(1, 2)))
    assert score("l1_norm", context)["0"].tolist() == [7, 1, 4]
    assert score("l2_norm", context)["0"].tolist() == pytest.approx([5, 1, 8**0.5])


@networks
@pytest.mark.parametrize(("pruner", "p"), [("l1_norm", 1), ("l2_norm", 2)])
def test_norms_of_filters_unit_by_unit(network: Network, pruner: str, p: int) -> None:
    """The norm of all weights in the slices that a unit owns of its producers, one slice after the other."""
    context = context_of(network)
    scores = score(pruner, context)
    tensors = dict(context.model.named_parameters())
    for name, group in context.graph.groups.items():
        for unit in range(group.size):
            slices = [
                tensors[member.tensor].detach().select(member.dim, index).flatten()
                for member in group.producers
                for index in np.flatnonzero(
                    context.graph.units[member.tensor, member.dim] == group.first_unit + unit
                ).tolist()
            ]
            expected = torch.linalg.vector_norm(torch.cat(slices).double(), p).item()
            assert scores[name][unit] == pytest.approx(expected, rel=1e-6)


def test_l1_norms_of_a_convolution_rank_as_torchs_own_structured_pruning() -> None:
    """torch.nn.utils.prune zeroes the filters of smallest L1 norm."""
    from torch.nn.utils import prune

    network = NETWORKS["Chain"]
    context = context_of(network)
    kept = select(score("l1_norm", context), {"conv1": 5, "conv2": 4})
    for layer, width in (("conv1", 5), ("conv2", 4)):
        conv = getattr(network.build(), layer)
        prune.ln_structured(conv, "weight", amount=conv.out_channels - width, n=1, dim=0)  # type: ignore[no-untyped-call]
        assert conv.weight_mask.flatten(1).any(1).nonzero().flatten().tolist() == kept[layer].tolist()


def test_uniform_keeps_the_first_channels_of_each_group() -> None:
    context = context_of(NETWORKS["Chain"])
    kept = select(score("uniform", context), {"conv1": 3, "conv2": 2})
    assert {name: units.tolist() for name, units in kept.items()} == {"conv1": [0, 1, 2], "conv2": [0, 1]}


def test_random_keeps_other_channels_for_another_seed_and_not_always_the_first() -> None:
    choices = {
        tuple(
            select(score("random", context_of(NETWORKS["Chain"], seed)), {"conv1": 4, "conv2": 6})[
                "conv1"
            ].tolist()
        )
        for seed in range(8)
    }
    assert len(choices) > 4
