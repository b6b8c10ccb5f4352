from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import NETWORKS

from archsearch.errors import UsageError
from archsearch.grouping import channel_graph
from archsearch.pruners import Context
from archsearch.pruners.calibration import all_filters, contribution_grams
from archsearch.pruners.reconstruction import factor_changes, scale_kept
from archsearch.pruners.thinet import ThiNet, addition_order, removal_order
from archsearch.surgery import shrink

Rows = npt.NDArray[np.float64]


@st.composite
def contributions(draw: st.DrawFn) -> Rows:
    """Samples of the contributions of a few units, ``(samples, size)``, correlated as channels are."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = draw(st.integers(2, 12))
    return rng.normal(size=(60, size)) @ rng.normal(size=(size, size)) + rng.normal(size=size)


def naive_removal(rows: Rows) -> list[int]:
    """Algorithm 1 of Luo et al. (ICCV 2017), over the rows."""
    dropped: list[int] = []
    while len(dropped) < rows.shape[1]:
        left = [unit for unit in range(rows.shape[1]) if unit not in dropped]
        errors = [np.square(rows[:, [*dropped, unit]].sum(1)).sum() for unit in left]
        dropped.append(left[int(np.argmin(errors))])
    return dropped


def naive_addition(rows: Rows) -> list[int]:
    """Greedy addition with a least squares fit of every candidate (Luo et al., TPAMI 2019)."""
    target, kept = rows.sum(1), []  # type: ignore[var-annotated]
    while len(kept) < rows.shape[1]:
        left = [unit for unit in range(rows.shape[1]) if unit not in kept]
        errors = []
        for unit in left:
            chosen = rows[:, [*kept, unit]]
            fit = np.linalg.lstsq(chosen, target, rcond=None)[0]
            errors.append(np.square(target - chosen @ fit).sum())
        kept.append(left[int(np.argmin(errors))])
    return kept


@given(contributions())
def test_greedy_removal_is_that_of_the_loop_over_samples(rows: Rows) -> None:
    assert removal_order(rows.T @ rows).tolist() == naive_removal(rows)


@given(contributions())
def test_greedy_addition_is_that_of_refitting_every_candidate(rows: Rows) -> None:
    ours, theirs = addition_order(rows.T @ rows).tolist(), naive_addition(rows)
    assert ours[:-1] == theirs[:-1]  # after the last but one the fit is as good as exact
    assert sorted(ours) == list(range(rows.shape[1]))


def test_greedy_removal_worked_out_by_hand() -> None:
    # Alone, unit 2 costs 1, unit 0 costs 4, unit 1 costs 9. With unit 2 gone, dropping unit 0 too costs
    # (2 - 1)^2 = 1, for they cancel; then unit 1.
    gram = np.outer([2, 3, -1], [2, 3, -1]).astype(float)
    assert removal_order(gram).tolist() == [2, 0, 1]


def test_greedy_addition_keeps_one_of_two_units_that_repeat_each_other() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(50, 4))
    rows[:, 3] = 2 * rows[:, 0]
    order = addition_order(rows.T @ rows).tolist()
    assert order.index(0) == 3 or order.index(3) == 3
    assert addition_order(np.zeros((3, 3))).tolist() == [0, 1, 2]


@given(contributions(), st.data())
def test_factors_are_those_of_least_squares_on_the_rows(rows: Rows, data: st.DataObject) -> None:
    size = rows.shape[1]
    kept = np.array(sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1))))
    changes = factor_changes(rows.T @ rows, kept, ridge=1e-12)
    fit = np.linalg.lstsq(rows[:, kept], rows.sum(1), rcond=None)[0]
    assert rows[:, kept] @ (1 + changes) == pytest.approx(rows[:, kept] @ fit, abs=1e-3)


@pytest.mark.parametrize(
    ("network", "reader", "kept", "channels"),
    [
        ("Chain", "conv2", [0, 2, 3, 7], [[0], [2], [3], [7]]),
        ("Grouped", "conv2", [1], [[1, 3, 5, 7]]),  # a unit is one channel of each of the 4 groups
        ("Flattened", "fc1", [0, 3], [[0, 1, 2, 3], [12, 13, 14, 15]]),  # and of each place
    ],
)
def test_the_next_layers_weights_get_the_factors_of_least_squares(
    network: str, reader: str, kept: list[int], channels: list[list[int]]
) -> None:
    model = NETWORKS[network].build()
    images = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    graph = channel_graph(model, images[:1])
    context = Context(model, graph, batches=lambda: [(images, torch.empty(0))])
    selection = {name: np.arange(group.size) for name, group in graph.groups.items()}
    selection["conv1"] = np.array(kept)
    every = contribution_grams(context, 64, 10**6, all_filters)
    fitted: Any = scale_kept(context, selection, every, 1e-12).get_submodule(reader)
    cut: Any = shrink(model, graph, selection).get_submodule(reader)

    layer: Any = model.get_submodule(reader)
    inputs: list[torch.Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        model(images)
        hook.remove()
        whole = layer(inputs[0])
        parts = []
        for mine in channels:
            without = inputs[0].clone()
            without[:, mine] = 0
            parts.append((whole - layer(without)).flatten())
        rows = torch.stack(parts, 1).double().numpy()
        target = (whole - layer(torch.zeros_like(inputs[0]))).flatten().double().numpy()
        expected = np.linalg.lstsq(rows, target, rcond=None)[0]
        factors = (fitted.weight / cut.weight).flatten(2 if cut.weight.dim() > 2 else 1).numpy()
    factors = factors.reshape(len(factors), len(kept), -1)
    assert factors == pytest.approx(np.broadcast_to(expected[:, None], factors.shape), rel=1e-3)
    assert np.abs(expected - 1).max() > 1e-2
    assert np.square(target - rows @ expected).sum() < np.square(target - rows.sum(1)).sum()


def test_both_variants_score_and_another_is_refused() -> None:
    model = NETWORKS["Chain"].build()
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    context = Context(model, channel_graph(model, images[:1]), batches=lambda: [(images, torch.empty(0))])
    removal, addition = (ThiNet(variant=variant).score(context) for variant in ("removal", "addition"))
    assert sorted(removal["conv1"]) == sorted(addition["conv1"]) == [k / 8 for k in range(8)]
    assert removal["conv2"].tolist() != addition["conv2"].tolist()
    with pytest.raises(UsageError, match="it must be 'removal' or 'addition'"):
        ThiNet(variant="both")  # type: ignore[arg-type]
