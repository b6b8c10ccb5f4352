from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import sparse_case as case
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import NETWORKS
from tiny_net import TinyNet
from torch import nn
from torch.nn import functional as F
from training_case import RECIPE, source

from archsearch.allocation import ALLOCATIONS, solve
from archsearch.branches import find_branches
from archsearch.cost import CostModel
from archsearch.errors import UsageError
from archsearch.graph import ChannelGraph
from archsearch.grouping import channel_graph
from archsearch.models import resolve
from archsearch.pruners import Context
from archsearch.pruners.sss import Scaled, SparseStructureSelection, proximal_step
from archsearch.space import Bounds, SearchSpace
from archsearch.surgery import shrink
from archsearch.targets import Target
from archsearch.tracing import output_tensors
from archsearch.training.determinism import derive_seed

numbers = st.floats(-3, 3, width=32)


def naive_step(w: float, m: float, g: float, lr: float, gamma: float, mu: float) -> tuple[float, float]:
    """One factor's step, as in the paper: z by gradient and soft threshold, then momentum."""
    z = w - lr * g
    z = math.copysign(max(abs(z) - lr * gamma, 0), z)
    m = z - w + mu * m
    return max(0, z + mu * m), m


@given(
    st.lists(st.tuples(st.floats(0, 3, width=32), numbers, st.lists(numbers, min_size=4, max_size=4))),
    st.floats(0.001, 0.5),
    st.floats(0.001, 2),
    st.floats(0, 0.99),
)
def test_the_steps_are_those_of_a_loop_over_the_factors(
    start: list[tuple[float, float, list[float]]], lr: float, gamma: float, mu: float
) -> None:
    factors = torch.tensor([w for w, _, _ in start], dtype=torch.float64)
    momentum = torch.tensor([m for _, m, _ in start], dtype=torch.float64)
    expected = [(w, m) for w, m, _ in start]
    for step in range(4):
        gradient = torch.tensor([g[step] for _, _, g in start], dtype=torch.float64)
        proximal_step(factors, momentum, gradient, lr, gamma, mu)
        expected = [
            naive_step(w, m, g[step], lr, gamma, mu)
            for (w, m), (_, _, g) in zip(expected, start, strict=True)
        ]
    assert factors.tolist() == pytest.approx([w for w, _ in expected], abs=1e-12)
    assert momentum.tolist() == pytest.approx([m for _, m in expected], abs=1e-12)


def test_a_step_worked_out_by_hand() -> None:
    # z = soft((1, 0.2) - 0.5 (-1, 0.5), 0.1) = (1.4, 0); m = (0.4, -0.2) + 0.5 (0.2, 0) = (0.5, -0.2)
    factors, momentum = torch.tensor([1.0, 0.2]), torch.tensor([0.2, 0.0])
    proximal_step(factors, momentum, torch.tensor([-1.0, 0.5]), lr=0.5, strength=0.2, decay=0.5)
    assert momentum.tolist() == pytest.approx([0.5, -0.2])
    assert factors.tolist() == pytest.approx([1.65, 0.0])  # 0 - 0.1 is below zero


def test_a_training_step_moves_the_factors_as_if_they_multiplied_the_activations() -> None:
    """The gradient is worked out on a network that multiplies what its norms put out."""
    torch.manual_seed(0)
    model = TinyNet(3, 2)
    data = source()
    (images, labels), *_ = data.train.batches(45, seed=derive_seed(0, "data"), epoch=0, train=True)
    one, two = torch.ones(8, requires_grad=True), torch.ones(16, requires_grad=True)
    x = F.relu(model.bn1(model.conv1(images)) * one[:, None, None])
    x = F.relu(model.bn2(model.conv2(x)) * two[:, None, None])
    F.cross_entropy(model.fc(x.mean((2, 3))), labels).backward()
    model.zero_grad()
    torch.manual_seed(0)
    training, graph = case.sparse_training("sss", TinyNet(3, 2), strength=0.5, momentum=0.9)
    recipe = RECIPE.with_(batch_size=45, epochs=1, lr=0.1, schedule="constant", weight_decay=0.3)
    case.run(training, recipe=recipe)
    network: Any = training.network
    for name, used in (("conv1", one), ("conv2", two)):
        group = graph.groups[name]
        factors = network.factors[group.first_unit : group.first_unit + group.size].tolist()
        assert used.grad is not None
        steps = [naive_step(1, 0, g, lr=0.1, gamma=0.5, mu=0.9)[0] for g in used.grad.tolist()]
        assert factors == pytest.approx(steps, abs=1e-5)
        assert np.ptp(factors) > 1e-4


BY_DESIGN = {"GroupNormed", "LayerNormed", "Attention", "FusedAttention"}
"""Norms over channels see fewer of them afterwards."""


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in BY_DESIGN | {"WeightNormed"}])
def test_where_factors_are_zero_the_units_can_be_removed_without_a_change(name: str) -> None:
    network = NETWORKS[name]
    model = network.build()
    graph = channel_graph(model, network.example())
    training = SparseStructureSelection().sparse_training(model, graph, graph.sizes)
    draw = np.random.default_rng(0)
    kept = {group: np.sort(draw.permutation(size)[: (size + 1) // 2]) for group, size in graph.sizes.items()}
    factors = torch.from_numpy(graph.kept_units(kept)[:-1] * draw.uniform(0.5, 2, graph.num_units))
    with torch.no_grad():
        scaled: Any = training.network
        scaled.factors.copy_(factors)
        plain = training.plain().eval()
        outputs = [net(network.example()) for net in (scaled, plain, shrink(plain, graph, kept))]
    whole, merged, small = (output_tensors(out)[0] for out in outputs)
    assert torch.equal(whole, merged)
    torch.testing.assert_close(small, whole, rtol=1e-5, atol=1e-5 * float(whole.abs().max()))


def test_the_optimiser_leaves_the_factors_alone_and_checkpoints_hold_them() -> None:
    training, _ = case.sparse_training("sss", case.planted())
    assert {"factors", "momentum"} <= training.network.state_dict().keys()
    assert not any("place" in name for name in training.network.state_dict())
    recipe = RECIPE.with_(weight_decay=10.0, lr=1e-3, epochs=1)  # would halve them
    case.run(training, recipe=recipe)
    network: Any = training.network
    assert network.factors.min() > 0.98
    assert network.momentum.abs().max() > 0


def test_units_without_factors_are_told_apart_by_their_filters() -> None:
    model = NETWORKS["Chain"].build()
    graph = channel_graph(model, NETWORKS["Chain"].example())
    training = SparseStructureSelection().sparse_training(model, graph, graph.sizes)
    network: Any = training.network
    with torch.no_grad():
        network.factors.zero_()
        network.factors[2] = 1e-6  # of a small filter
        model.conv1.weight[2] *= 0.1
    scores = SparseStructureSelection().score(Context(training.plain(), graph, sparse=network))
    assert int(np.argmax(scores["conv1"])) == 2
    sizes = model.conv1.weight.flatten(1).norm(dim=1).detach().numpy()
    others = np.delete(np.arange(8), 2)
    assert np.array_equal(np.argsort(scores["conv1"][others]), np.argsort(sizes[others]))


def test_scores_without_its_own_training_are_refused() -> None:
    model = NETWORKS["Chain"].build()
    graph = channel_graph(model, NETWORKS["Chain"].example())
    with pytest.raises(UsageError, match="sss: the factors come from its own training"):
        SparseStructureSelection().score(Context(model, graph))


def test_a_norm_that_multiplies_nothing_is_refused_since_factors_before_it_would_do_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Flatten(), nn.Linear(64, 3))
    graph = channel_graph(model, case.EXAMPLE)
    with pytest.raises(UsageError, match=r"sss: no norm scale and no plain filter .* take another --method"):
        SparseStructureSelection().sparse_training(model, graph, graph.sizes)


def test_the_trained_network_can_be_compiled_for_training() -> None:
    model = NETWORKS["Chain"].build()
    graph = channel_graph(model, NETWORKS["Chain"].example())
    scaled = SparseStructureSelection().sparse_training(model, graph, graph.sizes).network
    assert isinstance(scaled, Scaled)
    example = NETWORKS["Chain"].example()
    torch.testing.assert_close(
        torch.compile(scaled, backend="eager")(example), model(example), rtol=0, atol=0
    )


# --- factors on blocks ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blocks() -> tuple[Any, ChannelGraph, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = resolve("resnet20").build().eval()
    example = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return model, find_branches(model, channel_graph(model, example), example), example


def test_a_block_of_factor_zero_can_be_removed_without_a_change(
    blocks: tuple[Any, ChannelGraph, torch.Tensor],
) -> None:
    model, graph, example = blocks
    training = SparseStructureSelection(on="blocks").sparse_training(model, graph, graph.sizes)
    network: Any = training.network
    factors = np.linspace(0.5, 2, len(graph.branches))
    factors[[1, 4]] = 0
    gone = {name for number in (1, 4) for name in graph.branches[number].groups}
    kept = {name: np.arange(0 if name in gone else size) for name, size in graph.sizes.items()}
    with torch.no_grad():
        network.factors.copy_(torch.from_numpy(factors))
        plain = training.plain().eval()
        whole, merged, small = (net(example) for net in (network, plain, shrink(plain, graph, kept)))
        assert not torch.allclose(whole, model(example), rtol=1e-2)
    assert torch.equal(whole, merged)
    torch.testing.assert_close(small, whole, rtol=1e-5, atol=1e-5 * float(whole.abs().max()))


def test_the_blocks_of_the_smallest_factors_fall_as_a_whole(
    blocks: tuple[Any, ChannelGraph, torch.Tensor],
) -> None:
    model, graph, _ = blocks
    training = SparseStructureSelection(on="blocks").sparse_training(model, graph, graph.sizes)
    network: Any = training.network
    assert len(network.factors) == len(graph.branches) == 9
    with torch.no_grad():
        network.factors.copy_(torch.tensor([0.5, 0.1, 0.9, 0.8, 0.2, 0.3, 1.0, 0.7, 0.6]))
    context = Context(training.plain(), graph, sparse=network)
    scores = SparseStructureSelection(on="blocks").score(context)
    assert all(np.isinf(scores[name]).all() for name in ("conv1",) if name in graph.groups)
    space = SearchSpace(Bounds(min_keep=1.0), drop_branches=True)
    cost = CostModel(model, graph)
    widths = solve(cost, ALLOCATIONS["threshold"](scores), space.allowed(graph), [Target.parse("flops", 0.7)])
    gone = {name for number in (1, 4, 5) for name in graph.branches[number].groups}
    assert {name for name, width in widths.items() if width == 0} == gone
    assert all(width in (0, graph.sizes[name]) for name, width in widths.items())


def test_blocks_are_refused_where_nobody_looked_for_any_or_the_name_is_wrong() -> None:
    model = NETWORKS["Chain"].build()
    graph = channel_graph(model, NETWORKS["Chain"].example())
    with pytest.raises(UsageError, match="sss: on is 'blocks', but no residual branch may vanish"):
        SparseStructureSelection(on="blocks").sparse_training(model, graph, graph.sizes)
    with pytest.raises(UsageError, match="sss: on is 'filters': it must be 'neurons', 'groups' or"):
        SparseStructureSelection(on="filters")  # type: ignore[arg-type]
