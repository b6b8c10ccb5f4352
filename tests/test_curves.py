from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from networks import NETWORKS
from torch import nn

from archsearch.grouping import channel_graph
from archsearch.pruners import PRUNERS, Context
from archsearch.pruners.curves import best_first, curves, dropping_errors, least_squares_errors, of_scores
from archsearch.pruners.regression import Regression
from archsearch.pruners.taylor import Taylor
from archsearch.pruners.thinet import ThiNet

ALL = 10**6
"""More places than there are."""

PLAIN = [name for name in PRUNERS if "sparse training" not in PRUNERS[name].needs]
"""Methods that score a network as it is."""


def context_of(network: str, images: int = 12) -> Context:
    model = NETWORKS[network].build()

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        draw = torch.Generator().manual_seed(5)
        for _ in range(2):
            batch = 1 + torch.randn(images // 2, *NETWORKS[network].shape[1:], generator=draw)
            yield batch, torch.randint(0, 5, (images // 2,), generator=draw)

    return Context(model, channel_graph(model, NETWORKS[network].example()), batches=batches)


def rows_like_channels(seed: int, samples: int, size: int) -> Any:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(samples, size)) + 0.5 * rng.normal(size=(samples, 2)) @ rng.normal(size=(2, size))


# --- every method -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["Chain", "Residual", "Concat"])
@pytest.mark.parametrize("method", PLAIN)
def test_an_error_falls_to_zero_while_more_units_are_kept(method: str, network: str) -> None:
    context = context_of(network)
    weights = {name: tensor.clone() for name, tensor in context.model.state_dict().items()}
    pruner = PRUNERS[method]()
    found = curves(pruner, context, pruner.score(context))
    assert found.keys() == context.graph.groups.keys()
    for name, error in found.items():
        assert error.shape == (context.graph.groups[name].size + 1,)
        assert not np.isnan(error).any()
        finite = error[np.isfinite(error)]
        assert (np.diff(finite) <= 0).all() and finite[-1] == error[-1] == 0
    assert any((error[:-1] > 0).any() for error in found.values())
    again = curves(pruner, context, pruner.score(context))
    assert all(np.array_equal(found[name], again[name]) for name in found)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in context.model.state_dict().items())


def test_scores_worked_out_by_hand() -> None:
    scores = {"a": np.array([1.0, 3.0]), "b": np.array([2.0, 0.0, 6.0])}
    relative = of_scores(scores, across_groups=False)
    assert relative["a"].tolist() == [1, 0.25, 0] and relative["b"].tolist() == [1, 0.25, 0, 0]
    absolute = of_scores(scores, across_groups=True)
    assert absolute["a"].tolist() == [4, 1, 0] and absolute["b"].tolist() == [8, 2, 0, 0]


def test_what_is_worth_less_than_nothing_counts_from_the_least() -> None:
    """``uniform`` scores by minus the index: of 3 units, the best is worth 2 more than the last."""
    assert of_scores({"a": np.array([0.0, -1, -2])}, across_groups=False)["a"].tolist() == [1, 1 / 3, 0, 0]
    across = of_scores({"a": np.array([-1.0, 0]), "b": np.array([2.0])}, across_groups=True)
    assert across["a"].tolist() == [1, 0, 0] and across["b"].tolist() == [3, 0]


def test_infinite_scores_are_infinite_errors_and_zeros_none() -> None:
    found = of_scores({"a": np.full(2, np.inf), "b": np.zeros(2)}, across_groups=False)
    assert found["a"].tolist() == [np.inf, np.inf, 0] and found["b"].tolist() == [0, 0, 0]


def test_an_error_that_would_fall_with_fewer_units_is_raised() -> None:
    class Odd:
        source, allocation, needs = "", "local", ()

        def score(self, context: Context) -> Any:
            return {"a": np.arange(3.0)}

        def curves(self, context: Context, scores: Any) -> Any:
            return {"a": np.array([2.0, 5.0, 1.0, 0.0])}

    assert curves(Odd(), context_of("Chain"), {})["a"].tolist() == [5, 5, 1, 0]


# --- reconstruction ---------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
def test_the_error_of_dropping_is_the_squared_sum_of_the_dropped_rows(seed: int, size: int) -> None:
    rows = rows_like_channels(seed, 30, size)
    naive = [np.square(rows[:, kept:].sum(1)).sum() for kept in range(size + 1)]
    assert dropping_errors(rows.T @ rows) == pytest.approx(np.array(naive), abs=1e-9)


@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
def test_the_error_of_refitting_is_numpys_least_squares_on_the_rows(seed: int, size: int) -> None:
    rows = rows_like_channels(seed, 30, size)
    total, naive = rows.sum(1), []
    for kept in range(size + 1):
        fit = rows[:, :kept] @ np.linalg.lstsq(rows[:, :kept], total, rcond=None)[0]
        naive.append(np.square(total - fit).sum())
    assert least_squares_errors(rows.T @ rows) == pytest.approx(np.array(naive), abs=1e-4 * naive[0] + 1e-9)


def test_units_that_repeat_others_or_are_always_zero_have_nothing_to_add() -> None:
    rows = rows_like_channels(0, 30, 3)
    twice = np.concatenate([rows, rows, np.zeros((30, 2))], 1)
    errors = least_squares_errors(twice.T @ twice)
    assert errors[3:] == pytest.approx(np.zeros(6), abs=1e-4 * errors[0])
    assert least_squares_errors(np.zeros((2, 2))).tolist() == [0, 0, 0]


def outputs_without(context: Context, kept: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what Chain's conv2 computes from all channels of conv1, and from some."""
    model: Any = context.model
    images = torch.cat([batch for batch, _ in context.calibration()])
    with torch.no_grad():
        x = F.relu(model.bn1(model.conv1(images)))
        some = torch.zeros_like(x)
        some[:, kept] = x[:, kept]
        return model.conv2(x), model.conv2(some)


def test_thinets_curve_is_the_relative_error_of_the_next_layers_outputs() -> None:
    """At all places with all filters, by computing the layer without the channels."""
    context = context_of("Chain")
    pruner = ThiNet(images=ALL, places=10_000)
    scores = pruner.score(context)
    found = curves(pruner, context, scores)["conv1"]
    naive = []
    for kept in range(9):
        whole, part = outputs_without(context, best_first(scores["conv1"])[:kept].copy())
        naive.append(float((whole - part).square().sum() / whole.square().sum()))
    expected = np.maximum.accumulate(naive[::-1])[::-1]
    assert found == pytest.approx(expected, abs=0.03)  # random filters and places
    assert expected[0] == 1


@pytest.mark.parametrize(
    "pruner", [ThiNet(images=ALL, places=10_000, variant="addition"), Regression(images=ALL, places=ALL)]
)
def test_with_a_refit_the_error_is_lower(pruner: Any) -> None:
    context = context_of("Chain")
    scores = pruner.score(context)
    refit = curves(pruner, context, scores)["conv1"]
    plain = curves(ThiNet(images=ALL, places=10_000), context, scores)["conv1"]
    assert (refit[1:-1] < plain[1:-1] + 0.03).all() and refit[4] < plain[4]


def test_the_layers_that_read_a_group_add_up_and_other_groups_count_in_what_they_put_out() -> None:
    """``b`` alone is read by ``c`` beside ``a``: without both, all is lost; without one, a part."""
    context = context_of("Concat")
    pruner = Regression(images=ALL, places=ALL)
    found = curves(pruner, context, pruner.score(context))
    model: Any = context.model
    images = torch.cat([batch for batch, _ in context.calibration()])
    with torch.no_grad():
        x = F.relu(model.bn(torch.cat([model.a(images), model.b(images)], 1)))
        whole = F.conv2d(x, model.c.weight).double()
        for name, part in (("a", slice(0, 4)), ("b", slice(4, 10))):
            own = F.conv2d(x[:, part], model.c.weight[:, part]).double()
            assert found[name][0] == pytest.approx(float(own.square().sum() / whole.square().sum()), rel=1e-4)
        heads = context_of("TwoHeads")
        assert curves(pruner, heads, pruner.score(heads))["conv"][0] == pytest.approx(2)  # of two layers


# --- Taylor -----------------------------------------------------------------------------------------------


def test_taylors_curve_is_the_squared_first_order_change_without_all_dropped_units() -> None:
    """By a directional derivative: the loss along the line on which the dropped filters and norms fade."""
    context = context_of("Chain")
    scores = Taylor().score(context)
    found = Taylor().curves(context, scores)["conv2"]
    model: Any = context.model
    order = best_first(scores["conv2"])
    for kept in (0, 5, 11):
        dropped = torch.from_numpy(order[kept:].copy())
        squares = []
        for images, labels in context.calibration():
            direction = {name: torch.zeros_like(tensor) for name, tensor in model.named_parameters()}
            for name in ("conv2.weight", "bn2.weight", "bn2.bias"):
                direction[name][dropped] = model.get_parameter(name).detach()[dropped]
            direction["fc.weight"][:, dropped] = model.fc.weight.detach()[:, dropped]
            step = torch.zeros((), requires_grad=True)
            moved = {name: tensor + step * direction[name] for name, tensor in model.named_parameters()}
            loss = F.cross_entropy(torch.func.functional_call(model, moved, (images,)), labels)
            (slope,) = torch.autograd.grad(loss, step)
            squares.append(float(slope) ** 2)
        assert found[kept] == pytest.approx(np.mean(squares), rel=1e-3)


def test_a_method_without_curves_of_its_own_that_ranks_across_groups_keeps_its_units() -> None:
    context = context_of("Chain")
    scores = PRUNERS["bn_scale"]().score(context)
    found = curves(PRUNERS["bn_scale"](), context, scores)
    assert {name: error[0] for name, error in found.items()} == pytest.approx(
        {name: worth.sum() for name, worth in scores.items()}
    )


def test_a_group_that_no_layer_reads_stays() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(16, 3))
    context = Context(
        model.eval(),
        channel_graph(model, torch.randn(1, 3, 4, 4)),
        batches=lambda: [(torch.randn(4, 3, 4, 4), torch.zeros(4))],
    )
    found = {
        name: curves(pruner, context, pruner.score(context))[name]
        for pruner in (ThiNet(), Regression())
        for name in context.graph.groups
    }
    assert all(error[-1] == 0 for error in found.values())
