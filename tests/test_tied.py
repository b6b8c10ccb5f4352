from __future__ import annotations

import contextlib
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training_case import RECIPE, SignalAt, images, network, source, weights_hash

from archsearch.compression.shared import Shared
from archsearch.compression.tied import TiedTraining, digest, tied_weights
from archsearch.errors import PreemptedError, UsageError
from archsearch.recipe import Recipe
from archsearch.sparsity.masks import magnitude
from archsearch.training.callbacks import Callback, State
from archsearch.training.loop import train


def shared_network(bits: int = 3) -> tuple[nn.Module, dict[str, Shared]]:
    """Return a network whose weights are pruned to a half and shared."""
    model = network(norm=False, dropout=0.0)
    masks = magnitude(model, 0.5, "layer")
    parameters = dict(model.named_parameters())
    shared = {name: Shared.share(parameters[name], mask, bits, 5) for name, mask in masks.items()}
    for name, weights in shared.items():
        parameters[name].data.copy_(weights.dense())
    return model, shared


def lookup_gradients(model: nn.Module, shared: dict[str, Shared], batch: Any) -> dict[str, torch.Tensor]:
    """Return the gradients of the tables when the weights are looked up in them, by autograd."""
    tables = {name: weights.table().requires_grad_() for name, weights in shared.items()}
    looked_up = {name: tables[name][weights.code_map()] for name, weights in shared.items()}
    outputs = torch.func.functional_call(model, looked_up, (batch[0],))
    loss = F.cross_entropy(outputs, batch[1])
    return dict(zip(tables, torch.autograd.grad(loss, list(tables.values())), strict=True))


def test_the_gradient_of_a_centroid_is_what_autograd_gives_for_a_lookup() -> None:
    model, shared = shared_network()
    batch = images(24)
    expected = lookup_gradients(model, shared, batch)
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    state = State(model, 1, 1)
    callback = TiedTraining(shared)
    callback.on_start(state)
    callback.after_backward(state)
    for name, weights in shared.items():
        gradient = dict(model.named_parameters())[name].grad
        assert gradient is not None
        table = expected[name].clone()
        table[0] = 0  # the zero of pruned weights is not trained
        torch.testing.assert_close(gradient, table[weights.code_map()])


RECIPES = [
    RECIPE.with_(lr=0.01, weight_decay=0.01, momentum=0.9),
    RECIPE.with_(lr=0.01, optimizer="adamw", nesterov=False, momentum=0.0, ema_decay=0.9, clip_grad_norm=1.0),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=["sgd", "adamw"])
def test_weights_of_one_cluster_stay_equal_and_pruned_ones_zero(recipe: Recipe) -> None:
    model, shared = shared_network()
    before = {name: weights.centroids.copy() for name, weights in shared.items()}
    data = source()

    class Watch(Callback):
        def on_step(self, state: State) -> None:
            for name, weights in shared.items():
                parameter = dict(state.model.named_parameters())[name].detach()
                for code in range(len(weights.centroids) + 1):
                    members = parameter[weights.code_map() == code]
                    assert len(members.unique()) <= 1
                    if code == 0:
                        assert (members == 0).all()

    train(model, data.train, data.validation, recipe, device="cpu", callbacks=[TiedTraining(shared), Watch()])
    after = tied_weights(model, shared)
    for name, weights in after.items():
        assert (weights.centroids != before[name]).any()
        torch.testing.assert_close(dict(model.named_parameters())[name].detach(), weights.dense())


def test_a_step_of_plain_descent_moves_a_centroid_by_the_sum_of_its_members() -> None:
    model, shared = shared_network()
    data = source()
    recipe = Recipe(lr=0.01, momentum=0.0, weight_decay=0.0, schedule="constant", batch_size=45, epochs=1)
    batch = next(data.train.batches(45, seed=0, epoch=0, train=True))
    seen: list[Any] = []

    class Keep(Callback):
        def after_backward(self, state: State) -> None:
            seen.append(
                {name: p.grad.clone() for name, p in state.model.named_parameters() if p.grad is not None}
            )

    train(model, data.train, data.validation, recipe, device="cpu", callbacks=[Keep(), TiedTraining(shared)])
    assert len(batch[1]) == 45
    for name, weights in shared.items():
        for code in range(1, len(weights.centroids) + 1):
            moved = (
                weights.centroids[code - 1] - 0.01 * seen[0][name][weights.code_map() == code].sum().item()
            )
            assert tied_weights(model, shared)[name].centroids[code - 1] == pytest.approx(moved, abs=1e-6)


def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    data, found = source(), []
    for name, stops in (("peaceful", []), ("stopped", [SignalAt(8, signal.SIGTERM)])):
        for callbacks in ([*stops], []):
            model, shared = shared_network()
            with contextlib.suppress(PreemptedError):
                train(
                    model,
                    data.train,
                    data.validation,
                    RECIPE.with_(lr=0.01),
                    device="cpu",
                    directory=tmp_path / name,
                    callbacks=[TiedTraining(shared), *callbacks],
                )
        found.append(weights_hash(model))
    assert found[0] == found[1]
    assert (tmp_path / "stopped" / "result.json").exists()


def test_another_network_is_refused() -> None:
    _, shared = shared_network()
    with pytest.raises(UsageError, match="has no parameter"):
        TiedTraining(shared).on_start(State(nn.Linear(3, 4), 1, 1))


def test_the_digest_says_which_weights_share_and_not_their_values() -> None:
    _, shared = shared_network()
    _, coarser = shared_network(bits=2)
    moved = {name: weights.with_centroids(weights.centroids + 1) for name, weights in shared.items()}
    assert digest(moved) == digest(shared)
    assert digest(coarser) != digest(shared)
