from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, Network
from torch import nn

from archsearch.allocation import ALLOCATIONS, select, solve
from archsearch.cost import CostModel
from archsearch.errors import UsageError
from archsearch.graph import ChannelGroup, Selection, layer_of
from archsearch.grouping import channel_graph
from archsearch.models import resolve
from archsearch.pruners import PRUNERS, Context, Need, Scores, Sparsifying, inherit_weights
from archsearch.space import SearchSpace
from archsearch.surgery import shrink
from archsearch.targets import Target

pruners = pytest.mark.parametrize("pruner", list(PRUNERS))
networks = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS.keys())

WITHOUT_NORM = {
    "Flattened",
    "FusedAttention",
    "Functional",
    "Grouped",
    "Halves",
    "PaddedShortcut",
    "PixelShuffled",
    "SharedParameter",
    "Shuffled",
    "TiedAutoencoder",
    "Transposed",
    "TransposedDepthwise",
    "TwoHeads",
    "UsedTwice",
    "WeightNormed",
}
REFUSED = {
    "bn_scale": WITHOUT_NORM,
    "slimming": WITHOUT_NORM,
    "sss": {"WeightNormed"},  # the lengths of its filters are no filters
    "taylor": {"Grouped", "Transposed", "TransposedDepthwise"},  # their outputs are pictures, not classes
}
"""What a method cannot do, and says so."""


def context_of(network: Network, seed: int = 0) -> Context:
    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        draw = torch.Generator().manual_seed(5)
        for _ in range(2):
            images = torch.randn(6, *network.shape[1:], generator=draw)
            yield images, torch.randint(3, (6,), generator=draw)

    model = network.build()
    return Context(model, channel_graph(model, network.example()), seed, batches)


def score(pruner: str, context: Context) -> Scores:
    """Return the scores of a method with its published hyper-parameters, after a training of no steps."""
    method = PRUNERS[pruner]()
    if isinstance(method, Sparsifying):
        training = method.sparse_training(copy.deepcopy(context.model), context.graph, context.graph.sizes)
        context = dataclasses.replace(context, model=training.plain(), sparse=training.network)
    return method.score(context)


def refuses(pruner: str, network: Network) -> bool:
    """Return whether a method cannot score a network, after checking that it says so."""
    if network.factory.__name__ not in REFUSED.get(pruner, ()):
        return False
    with pytest.raises(UsageError, match=f"{pruner}: .* take another --method"):
        score(pruner, context_of(network))
    return True


def half(scores: Scores) -> Selection:
    return select(scores, {name: (len(worth) + 1) // 2 for name, worth in scores.items()})


# --- what holds for every pruner ------------------------------------------------------------------------


@pruners
@networks
def test_every_unit_has_a_finite_score_or_its_whole_group_stays(pruner: str, network: Network) -> None:
    if refuses(pruner, network):
        return
    context = context_of(network)
    scores = score(pruner, context)
    assert list(scores) == list(context.graph.groups)
    for name, size in context.graph.sizes.items():
        assert scores[name].shape == (size,) and scores[name].dtype == np.float64
        assert np.isfinite(scores[name]).all() or (scores[name] == np.inf).all()
    assert any(np.isfinite(worth).all() for worth in scores.values())


@pruners
@networks
def test_inherited_weights_run_fit_their_places_and_come_out_the_same_again(
    pruner: str, network: Network
) -> None:
    if refuses(pruner, network):
        return
    context = context_of(network)
    kept = half(score(pruner, context))
    small = inherit_weights(PRUNERS[pruner](), context, kept)
    small(network.example())
    shapes = {name: tensor.shape for name, tensor in small.state_dict().items()}
    cut = shrink(context.model, context.graph, kept).state_dict()
    assert shapes == {name: tensor.shape for name, tensor in cut.items()}
    again = inherit_weights(PRUNERS[pruner](), context_of(network), kept).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in small.state_dict().items())


@pruners
@networks
def test_where_nothing_is_dropped_the_inherited_weights_are_the_references(
    pruner: str, network: Network
) -> None:
    # In double precision: rounding differs with the number of threads, and a fit may amplify it.
    context = context_of(network)
    context.model.double()
    every = {name: np.arange(size) for name, size in context.graph.sizes.items()}
    small = inherit_weights(PRUNERS[pruner](), context, every)
    for name, tensor in context.model.state_dict().items():
        torch.testing.assert_close(small.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


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
@pytest.mark.parametrize("training", [False, True])
def test_scoring_and_inheriting_change_nothing_of_the_model(pruner: str, training: bool) -> None:
    context = context_of(NETWORKS["InvertedBottleneck"])
    context.model.train(training)
    for parameter in context.model.parameters():
        parameter.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in context.model.state_dict().items()}
    modes = [module.training for module in context.model.modules()]
    units = context.graph.units
    inherit_weights(PRUNERS[pruner](), context, half(score(pruner, context)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in context.model.state_dict().items())
    assert [module.training for module in context.model.modules()] == modes
    assert all(parameter.grad is None for parameter in context.model.parameters())
    assert not any(parameter.requires_grad for parameter in context.model.parameters())
    assert context.graph.units is units


@pruners
def test_a_network_in_double_precision_is_scored_like_the_same_in_single(pruner: str) -> None:
    single, double = context_of(NETWORKS["Chain"]), context_of(NETWORKS["Chain"])
    double.model.double()
    kept = half(score(pruner, single))
    wide = score(pruner, double)
    for name, units in half(wide).items():
        assert units.tolist() == kept[name].tolist()
    assert next(inherit_weights(PRUNERS[pruner](), double, kept).parameters()).dtype == torch.float64


@pruners
def test_a_method_that_needs_images_says_so_without_any_and_others_need_none(pruner: str) -> None:
    context = context_of(NETWORKS["Chain"])
    blind = dataclasses.replace(context, batches=None)
    if "images" not in PRUNERS[pruner].needs:
        seen = score(pruner, context)
        assert all(np.array_equal(worth, seen[name]) for name, worth in score(pruner, blind).items())
        return
    with pytest.raises(UsageError, match="give --data"):
        score(pruner, blind)
    with pytest.raises(UsageError, match="--data has none"):
        score(pruner, dataclasses.replace(context, batches=list))


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
    assert set(kind.needs) <= set(get_args(Need))
    assert kind.__doc__


@pruners
def test_a_pruner_is_frozen_and_compares_by_its_hyper_parameters(pruner: str) -> None:
    one = PRUNERS[pruner]()
    assert one == PRUNERS[pruner]()
    with pytest.raises(AttributeError):
        one.anything = 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("pruner", "wrong"),
    [
        ("thinet", {"images": 0}),
        ("thinet", {"ridge": 0.0}),
        ("regression", {"places": 0}),
        ("regression", {"ridge": float("nan")}),
        ("taylor", {"batches": 0}),
        ("hrank", {"images": 0}),
        ("chip", {"images": 0}),
        ("slimming", {"strength": 0.0}),
        ("slimming", {"strength": float("inf")}),
        ("sss", {"strength": float("nan")}),
        ("sss", {"momentum": 1.0}),
        ("group_l1", {"strength": -1.0}),
    ],
)
def test_hyper_parameters_that_cannot_be_are_refused(pruner: str, wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(UsageError, match=f"{pruner}: {name} is .*: it must be"):
        PRUNERS[pruner](**wrong)


# --- useless channels, planted --------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["filters", "readers"])
@pytest.mark.parametrize("pruner", [name for name in PRUNERS if "images" in PRUNERS[name].needs])
def test_methods_that_look_at_data_drop_planted_dead_channels_first(pruner: str, where: str) -> None:
    """Channels whose filters are zero, behind a norm that shifts nothing, or that every reader ignores."""
    if pruner in ("hrank", "chip") and where == "readers":
        return  # they see the channels alone, and not what reads them
    network = NETWORKS["Chain"]
    context = context_of(network)
    dead = {"conv1": [1, 4, 6], "conv2": [0, 7, 11]}
    readers = {"conv1": "conv2", "conv2": "fc"}
    with torch.no_grad():
        for layer, channels in dead.items():
            if where == "filters":
                getattr(context.model, layer).weight[channels] = 0
            else:
                getattr(context.model, readers[layer]).weight[:, channels] = 0
    scores = score(pruner, context)
    for layer, channels in dead.items():
        lowest = np.argsort(scores[layer])[: len(channels)]
        assert sorted(lowest.tolist()) == channels
        assert max(scores[layer][channels]) < min(np.delete(scores[layer], channels))


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
        if not all(member.tensor in tensors for member in group.producers):  # selected, not computed
            assert np.isinf(scores[name]).all()
            continue
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


# --- the same ranking as torch-pruning, where the definitions are the same -------------------------------
#
# Its L1 and L2 scores are of one layer with `group_reduction="first"`; ours add up over all that produce the
# group, depthwise convolutions too, which it leaves out. Its FPGM takes distances between the magnitudes of
# weights, and means over all layers of the group, the reading ones too: it is the published one for a single
# producer without negative weights. Its Taylor score takes magnitudes layer by layer, leaves norms out, and
# means; ours is the square of the signed sum. Where the network is homogeneous (ReLU, no bias, no norm), the
# signed sum of each layer is the same number.


def peer_scores(model: nn.Module, layer: str, shape: tuple[int, ...], importance: Any) -> npt.NDArray[Any]:
    import torch_pruning as tp

    graph = tp.DependencyGraph().build_dependency(model, torch.randn(shape).to(next(model.parameters())))
    conv = model.get_submodule(layer)
    group = graph.get_pruning_group(conv, tp.prune_conv_out_channels, list(range(conv.out_channels)))
    return np.asarray(importance(group).double())


PEER_MODELS = [("resnet56", {"shortcut": "projection"}), ("mobilenet_v2", {})]


@pytest.fixture(scope="module", params=PEER_MODELS, ids=lambda param: param[0])
def peered(request: pytest.FixtureRequest) -> Context:
    name, arguments = request.param
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = resolve(name).build(**arguments).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight)
    return Context(model, channel_graph(model, torch.randn(1, 3, 32, 32)))


def depthwise(model: nn.Module, group: ChannelGroup) -> bool:
    layers = [model.get_submodule(layer_of(member.tensor)) for member in group.producers]
    return any(isinstance(layer, nn.Conv2d) and layer.groups > 1 for layer in layers)


def single_producers(context: Context) -> dict[str, str]:
    found = {
        name: layer_of(group.producers[0].tensor)
        for name, group in context.graph.groups.items()
        if len(group.producers) == 1 and group.size > 1
    }
    assert len(found) >= 3
    return dict(list(found.items())[:: max(1, len(found) // 6)])


@pytest.mark.parametrize(("pruner", "p"), [("l1_norm", 1), ("l2_norm", 2)])
def test_norms_rank_as_torch_prunings_also_where_several_layers_produce_a_group(
    peered: Context, pruner: str, p: int
) -> None:
    import torch_pruning as tp

    scores = score(pruner, peered)
    importance = tp.importance.MagnitudeImportance(p=p, group_reduction="first", normalizer=None)
    dense = [group for group in peered.graph.groups.values() if not depthwise(peered.model, group)]
    assert any(len(group.producers) > 1 for group in dense)
    for group in dense[::4]:
        theirs = sum(
            peer_scores(peered.model, layer_of(member.tensor), (1, 3, 32, 32), importance)
            for member in group.producers
        )
        assert scores[group.name] ** p == pytest.approx(theirs, rel=1e-5)


def test_bn_scales_rank_as_torch_prunings(peered: Context) -> None:
    import torch_pruning as tp

    scores = score("bn_scale", peered)
    importance = tp.importance.BNScaleImportance(normalizer=None)
    for name in list(peered.graph.groups)[::8]:
        theirs = peer_scores(peered.model, name, (1, 3, 32, 32), importance)
        assert scores[name] == pytest.approx(theirs, rel=1e-5)


def test_geometric_medians_rank_as_torch_prunings_for_weights_without_signs(peered: Context) -> None:
    import torch_pruning as tp

    unsigned = copy.deepcopy(peered.model).double()
    with torch.no_grad():
        for parameter in unsigned.parameters():
            parameter.abs_()
    scores = score("fpgm", dataclasses.replace(peered, model=unsigned))
    importance = tp.importance.FPGMImportance(p=1, group_reduction="first", normalizer=None)
    for name, layer in single_producers(peered).items():
        theirs = peer_scores(unsigned, layer, (1, 3, 32, 32), importance)
        assert scores[name] == pytest.approx(theirs, rel=1e-6)
        assert np.array_equal(np.argsort(scores[name]), np.argsort(theirs))


def test_taylor_ranks_as_torch_prunings_in_a_homogeneous_network() -> None:
    import torch_pruning as tp

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        convs = [nn.Conv2d(a, b, 3, bias=False) for a, b in ((3, 12), (12, 16), (16, 8))]
        model = nn.Sequential(
            convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2], nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        images, labels = torch.randn(16, 3, 12, 12), torch.randint(8, (16,))
    graph = channel_graph(model, images[:1])
    scores = score("taylor", Context(model, graph, batches=lambda: [(images, labels)]))
    F.cross_entropy(model(images), labels).backward()
    importance = tp.importance.TaylorImportance(group_reduction="first", normalizer=None, multivariable=True)
    for name, members in (("0", 2), ("2", 2)):
        theirs = peer_scores(model, name, (1, 3, 12, 12), importance)
        assert len(graph.groups[name].members) == members
        assert scores[name] == pytest.approx((members * theirs) ** 2, rel=1e-3)
        assert np.array_equal(np.argsort(scores[name]), np.argsort(theirs))
