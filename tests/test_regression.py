from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NETWORKS
from torch import nn

from archsearch.allocation import select
from archsearch.grouping import channel_graph
from archsearch.models import resolve
from archsearch.pruners import Context, inherit_weights, reconstruction
from archsearch.pruners.reconstruction import least_change
from archsearch.pruners.regression import Regression, entry_penalties
from archsearch.surgery import shrink


def rows_like_channels(seed: int, samples: int, size: int) -> Any:
    """Contributions that are as correlated as channels are."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(samples, size)) + 0.5 * rng.normal(size=(samples, 3)) @ rng.normal(size=(3, size))


def lasso_support(rows: Any, penalty: float) -> set[int]:
    """Return which coefficients scikit-learn's coordinate descent leaves on the rows."""
    from sklearn.linear_model import Lasso

    model = Lasso(alpha=penalty / len(rows), fit_intercept=False, tol=1e-12, max_iter=100_000)
    return set(np.flatnonzero(model.fit(rows, rows.sum(1)).coef_).tolist())


# --- the choice -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 24, 64])
def test_the_best_channels_are_the_support_of_scikit_learns_lasso(size: int) -> None:
    """At a penalty between those at which the c-th and the next channel enter, for every c."""
    rows = rows_like_channels(0, 20 * size, size)
    penalties = entry_penalties(rows.T @ rows)
    falling = np.sort(penalties)[::-1]
    assert (np.diff(falling) < 0).all() and falling[-1] > 0
    for c in range(1, size, max(1, size // 8)):
        support = lasso_support(rows, (falling[c - 1] + falling[c]) / 2)
        assert support == set(np.argsort(-penalties)[:c].tolist())


@given(st.integers(0, 2**32 - 1), st.integers(2, 10))
@settings(max_examples=30)
def test_all_that_takes_part_at_a_penalty_is_among_the_channels_that_entered_above_it(
    seed: int, size: int
) -> None:
    """Also where a channel leaves again, which it need not be missed for."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(40, size)) @ rng.normal(size=(size, size))
    penalties = entry_penalties(rows.T @ rows)
    falling = np.sort(penalties)[::-1]
    for high, low in itertools.pairwise(falling):
        entered = set(np.flatnonzero(penalties > (high + low) / 2).tolist())
        if high > low * (1 + 1e-6):
            assert lasso_support(rows, (high + low) / 2) <= entered


def test_the_penalties_of_uncorrelated_channels_worked_out_by_hand() -> None:
    """Soft thresholding: a channel takes part as long as its square is above the penalty."""
    assert entry_penalties(np.diag([4.0, 9.0, 1.0, 0.0])) == pytest.approx([4, 9, 1, 0])


@given(st.floats(1e-9, 1e9))
def test_the_scale_of_the_outputs_is_the_scale_of_the_penalties(scale: float) -> None:
    rows = rows_like_channels(3, 60, 6)
    gram = rows.T @ rows
    assert entry_penalties(scale * gram) == pytest.approx(scale * entry_penalties(gram), rel=1e-6)


def test_more_than_500_channels_are_all_ranked() -> None:
    rows = rows_like_channels(1, 2_000, 600)
    penalties = entry_penalties(rows.T @ rows)
    assert (penalties > 0).all()


# --- the weights ------------------------------------------------------------------------------------------


def test_the_least_change_is_numpys_least_squares_with_rows_for_the_ridge() -> None:
    rng = np.random.default_rng(0)
    x, residual = rng.normal(size=(30, 5)), rng.normal(size=(30, 4))
    for ridge in (0.0, 0.1):
        penalty = ridge * np.square(x).sum(0).mean()
        rows = np.vstack([x, np.sqrt(penalty) * np.eye(5)])
        expected = np.linalg.lstsq(rows, np.vstack([residual, np.zeros((5, 4))]), rcond=None)[0]
        change = least_change(torch.from_numpy(x.T @ x), torch.from_numpy(x.T @ residual), ridge)
        assert change.numpy() == pytest.approx(expected)


def test_inputs_that_are_always_zero_ask_for_no_change() -> None:
    assert least_change(torch.zeros(3, 3), torch.zeros(3, 2), 0.0).tolist() == [[0.0, 0.0]] * 3


def images_for(network: str, count: int = 200) -> torch.Tensor:
    shape = NETWORKS[network].shape[1:]
    return 1 + torch.rand(count, *shape, generator=torch.Generator().manual_seed(0))


def context_of(network: str) -> Context:
    model, images = NETWORKS[network].build(), images_for(network)
    half = len(images) // 2
    return Context(
        model,
        channel_graph(model, images[:1]),
        batches=lambda: [(part, torch.empty(0)) for part in (images[:half], images[half:])],
    )


def half_of(context: Context) -> Any:
    scores = Regression(images=200).score(context)
    return select(scores, {name: (size + 1) // 2 for name, size in context.graph.sizes.items()})


def test_the_weights_of_each_layer_are_numpys_least_squares_on_what_the_small_network_gives_it() -> None:
    """For the first reading layer and the next, whose input already carries the error of the first.

    Numpy's solution is the least of all; ours is the least change, so it is the change that is compared.
    """
    context = context_of("Chain")
    kept = half_of(context)
    small: Any = Regression(images=200, places=16, ridge=1e-12).inherit(context, kept)
    cut: Any = shrink(context.model, context.graph, kept)
    reference: Any = context.model
    images = images_for("Chain")
    with torch.no_grad():
        inputs = torch.relu(small.bn1(small.conv1(images)))
        patches = nn.functional.unfold(inputs, 3, padding=1, stride=2).transpose(1, 2).flatten(0, 1)
        wanted = reference.conv2(torch.relu(reference.bn1(reference.conv1(images))))[:, kept["conv2"]]
        missing = (wanted - cut.conv2(inputs)).permute(0, 2, 3, 1).flatten(0, 2)
        change = np.linalg.lstsq(patches.double().numpy(), missing.double().numpy(), rcond=1e-7)[0].T
        ours = (small.conv2.weight - cut.conv2.weight).flatten(1).numpy()
        assert ours == pytest.approx(change, rel=1e-2, abs=1e-4)
        assert np.abs(change).max() > 0.05

        features = torch.relu(small.bn2(small.conv2(inputs))).mean((2, 3))
        rows = torch.cat([features, torch.ones(len(features), 1)], 1)  # with a bias
        missing = reference(images) - cut.fc(features)
        change = np.linalg.lstsq(rows.double().numpy(), missing.double().numpy(), rcond=1e-7)[0].T
        ours = torch.cat([small.fc.weight - cut.fc.weight, (small.fc.bias - cut.fc.bias)[:, None]], 1).numpy()
        assert ours == pytest.approx(change, rel=1e-2, abs=1e-3)
        assert np.abs(change).max() > 0.05


@pytest.mark.parametrize(
    "network",
    [
        "Chain",
        "Residual",
        "Concat",
        "Grouped",
        "Shuffled",
        "Flattened",
        "Attention",
        "OneDimensional",
        "Halves",
    ],
)
def test_the_outputs_come_nearer_to_the_references_than_those_of_the_cut_weights(network: str) -> None:
    context = context_of(network)
    kept = half_of(context)
    fresh = 1 + torch.rand(64, *NETWORKS[network].shape[1:], generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        target = context.model(fresh)
        cut = shrink(context.model, context.graph, kept)(fresh)
        fitted = inherit_weights(Regression(images=200), context, kept)(fresh)
    assert nn.functional.mse_loss(fitted, target) < 0.9 * nn.functional.mse_loss(cut, target)


@pytest.mark.parametrize("network", ["UsedTwice", "TiedAutoencoder", "WeightNormed"])
def test_weights_that_are_not_a_layers_own_stay_as_they_were_cut(network: str) -> None:
    context = context_of(network)
    kept = half_of(context)
    small, cut = (
        model.state_dict()
        for model in (
            Regression(images=200).inherit(context, kept),
            shrink(context.model, context.graph, kept),
        )
    )
    changed = {name for name in cut if not torch.equal(small[name], cut[name])}
    assert changed == (set() if network == "TiedAutoencoder" else {"fc.weight", "fc.bias"})


def test_a_network_in_channels_last_is_fitted_too() -> None:
    context = context_of("Chain")
    kept = half_of(context)
    plain = Regression(images=200).inherit(context, kept).state_dict()
    context.model.to(memory_format=torch.channels_last)
    for name, tensor in Regression(images=200).inherit(context, kept).state_dict().items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-3, atol=1e-4)


# --- residual branches ------------------------------------------------------------------------------------


class TwoBlocks(nn.Module):
    """The stream into the second block carries the error of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1, bias=False) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(4))
        self.fc = nn.Linear(6, 5)
        for norm in self.norms:
            nn.init.uniform_(norm.weight, 0.5, 1.5)  # type: ignore[arg-type]
            nn.init.uniform_(norm.running_var, 0.5, 1.5)  # type: ignore[arg-type]

    def branch(self, block: int, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norms[2 * block](self.convs[2 * block](x)))
        out: torch.Tensor = self.norms[2 * block + 1](self.convs[2 * block + 1](x))
        return out

    def forward(self, x: torch.Tensor) -> Any:
        x = torch.relu(self.stem(x))
        for block in range(2):
            x = torch.relu(self.branch(block, x) + x)
        return self.fc(x.mean((2, 3)))


def two_blocks() -> Context:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TwoBlocks().eval()
    images = images_for("Chain", 60)
    return Context(model, channel_graph(model, images[:1]), batches=lambda: [(images, torch.empty(0))])


def test_the_end_of_a_branch_is_numpys_least_squares_to_what_the_sum_lacks() -> None:
    """Of its own output and of the shortcut, in units of the convolution before its norm."""
    context = two_blocks()
    kept = select(
        Regression(images=60).score(context), {name: size - 2 for name, size in context.graph.sizes.items()}
    )
    small: Any = Regression(images=60, places=64, ridge=1e-12).inherit(context, kept)
    cut: Any = shrink(context.model, context.graph, kept)
    reference: Any = context.model
    images, stream = images_for("Chain", 60), kept["stem"]
    with torch.no_grad():
        was = torch.relu(reference.stem(images))
        was = torch.relu(reference.branch(0, was) + was)
        now = torch.relu(small.stem(images))
        now = torch.relu(small.branch(0, now) + now)
        assert (was[:, stream] - now).abs().max() > 0.01
        norm = reference.norms[3]
        scale = (norm.weight / (norm.running_var + norm.eps).sqrt())[stream]
        inputs = torch.relu(small.norms[2](small.convs[2](now)))
        wanted = reference.convs[3](torch.relu(reference.norms[2](reference.convs[2](was))))[:, stream]
        wanted = wanted + (was[:, stream] - now) / scale[:, None, None]
        missing = (wanted - cut.convs[3](inputs)).permute(0, 2, 3, 1).flatten(0, 2)
        patches = nn.functional.unfold(inputs, 3, padding=1).transpose(1, 2).flatten(0, 1)
        change = np.linalg.lstsq(patches.double().numpy(), missing.double().numpy(), rcond=1e-7)[0].T
    ours = (small.convs[3].weight - cut.convs[3].weight).detach().flatten(1).numpy()
    assert ours == pytest.approx(change, rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("name", ["resnet20", "preresnet56"])
def test_the_blocks_of_a_resnet_come_nearer_to_the_references_than_without_the_correction(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the shortcut pads channels, which it does after the branch has run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = resolve(name).build()
    images = torch.rand(48, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for _ in range(20):
            model.train()(images)
    context = Context(
        model.eval(), channel_graph(model, images[:1]), batches=lambda: [(images, torch.empty(0))]
    )
    kept = {name: np.arange((size + 1) // 2) for name, size in context.graph.sizes.items()}
    method = Regression(images=48, places=48)

    def error() -> float:
        small = method.inherit(context, kept)
        with torch.no_grad():
            return float(nn.functional.mse_loss(small(images), model(images)))

    corrected = error()
    monkeypatch.setattr(reconstruction._Noted, "shortcuts", {})
    assert corrected < 0.95 * error()
