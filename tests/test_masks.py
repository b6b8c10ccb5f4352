from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune
from training_case import RECIPE, SignalAt, network, run, weights_hash

from archsearch.errors import IntegrityError, UsageError
from archsearch.recipe import Recipe
from archsearch.sparsity.masks import (
    MaskedTraining,
    Masks,
    choose,
    magnitude,
    weight_names,
)
from archsearch.tensor_files import write_tensors
from archsearch.training.callbacks import Callback, State

SGD = RECIPE.with_(momentum=0.9, weight_decay=0.1)
OPTIMIZERS = {
    "sgd with momentum and weight decay": SGD,
    "adam": SGD.with_(optimizer="adam", lr=0.01),
    "adamw": SGD.with_(optimizer="adamw", lr=0.01),
    "averaged weights": SGD.with_(ema_decay=0.9),
}


class Zeros(Callback):
    """Check after every step that exactly the masked weights are zero, and count the steps."""

    def __init__(self, masks: Masks) -> None:
        self.masks, self.steps = masks, 0

    def on_step(self, state: State) -> None:
        weights = dict(state.model.named_parameters())
        for name, mask in self.masks.items():
            assert torch.equal(weights[name].detach() != 0, mask)
        self.steps += 1


def two_layers() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 10))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter)
    return model


# ------------------------------------------------------------------------------------------- which weights


def test_convolutions_linear_attention_and_recurrent_weights_count_and_nothing_else() -> None:
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(2, 4, 3),
            "norm": nn.BatchNorm2d(4),
            "words": nn.Embedding(5, 4),
            "up": nn.ConvTranspose1d(4, 2, 3),
            "lstm": nn.LSTM(4, 3, bidirectional=True),
            "cell": nn.GRUCell(4, 3),
            "attention": nn.MultiheadAttention(4, 2),
            "fc": nn.Linear(4, 2),
        }
    )
    assert weight_names(model, "conv") == ("conv.weight", "up.weight")
    assert set(weight_names(model)) == {
        "conv.weight",
        "up.weight",
        "lstm.weight_ih_l0",
        "lstm.weight_hh_l0",
        "lstm.weight_ih_l0_reverse",
        "lstm.weight_hh_l0_reverse",
        "cell.weight_ih",
        "cell.weight_hh",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "fc.weight",
    }


def test_a_weight_that_two_layers_share_counts_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    assert weight_names(model) == ("0.weight",)


def test_a_network_without_such_weights_is_refused() -> None:
    with pytest.raises(UsageError, match="no weights of scope 'conv'"):
        weight_names(nn.Linear(2, 2), "conv")


# ------------------------------------------------------------------------------------------- which of them


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.1])
def test_one_threshold_keeps_what_torchs_global_pruning_keeps(keep: float) -> None:
    model = two_layers()
    masks = magnitude(model, keep)
    layers = [(model[0], "weight"), (model[3], "weight")]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=1 - keep)
    assert torch.equal(masks["0.weight"], model[0].weight_mask.bool())
    assert torch.equal(masks["3.weight"], model[3].weight_mask.bool())


def test_a_share_of_every_layer_keeps_what_torchs_pruning_keeps() -> None:
    model = two_layers()
    masks = magnitude(model, 0.25, "layer")
    for number in (0, 3):
        prune.l1_unstructured(model[number], "weight", amount=0.75)
        assert torch.equal(masks[f"{number}.weight"], model[number].weight_mask.bool())


@given(
    st.lists(st.integers(0, 3), min_size=6, max_size=20),
    st.lists(st.integers(0, 3), min_size=1, max_size=20),
    st.floats(0.3, 1.0),
    st.sampled_from(["global", "layer"]),
)
def test_no_dropped_weight_is_worth_more_than_a_kept_one_and_the_count_is_exact(
    first: list[int], second: list[int], keep: float, allocation: str
) -> None:
    scores = {"a": torch.tensor(first).float(), "b": torch.tensor(second).float()}
    masks = choose(scores, keep, allocation)
    if allocation == "layer":
        for name, score in scores.items():
            assert int(masks[name].sum()) == max(1, round(keep * len(score)))
    else:
        assert masks.kept == round(keep * masks.total)
    for name, score in scores.items():
        assert masks[name].any()
        kept, dropped = score[masks[name]], score[~masks[name]]
        assert not len(dropped) or kept.min() >= dropped.max()


def test_of_equal_weights_the_first_stay() -> None:
    masks = choose({"a": torch.ones(2, 3)}, 0.5, "global")
    assert masks["a"].tolist() == [[True, True, True], [False, False, False]]


def test_a_mask_is_decided_by_position_where_weights_are_zero_already() -> None:
    masks = choose({"a": torch.tensor([0.0, 5.0, 0.0, 0.0])}, 0.75, "global")
    assert masks["a"].tolist() == [True, True, True, False]


def test_a_layer_that_one_threshold_would_empty_keeps_its_best_weight_and_is_named() -> None:
    scores = {"small": torch.tensor([0.1, 0.3, 0.2]), "large": torch.arange(1.0, 8.0)}
    masks = choose(scores, 0.4, "global")
    assert masks.lifted == ("small",)
    assert masks["small"].tolist() == [False, True, False]
    assert masks["large"].tolist() == [False] * 4 + [True] * 3
    assert choose(scores, 0.8, "global").lifted == ()


def test_a_share_that_leaves_less_than_a_weight_for_each_layer_is_refused() -> None:
    with pytest.raises(UsageError, match=r"leaves 1 weights for 2 layers; give at least 0\.2"):
        choose({"a": torch.ones(5), "b": torch.ones(5)}, 0.1, "global")


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.1, float("nan")])
def test_a_share_outside_of_its_range_is_refused(keep: float) -> None:
    with pytest.raises(UsageError, match="--keep"):
        choose({"a": torch.ones(5)}, keep, "global")


def test_what_an_earlier_mask_dropped_stays_dropped_whatever_it_scores() -> None:
    scores = {"a": torch.tensor([4.0, 3.0, 2.0, 1.0])}
    before = Masks({"a": torch.tensor([False, True, True, True])})
    assert choose(scores, 0.5, "global", before)["a"].tolist() == [False, True, True, False]
    with pytest.raises(UsageError, match="keep shares only fall"):
        choose(scores, 1.0, "global", before)


def test_layers_can_have_shares_of_their_own() -> None:
    scores = {"a": torch.arange(10.0), "b": torch.arange(10.0), "c": torch.arange(10.0)}
    masks = choose(scores, {"a": 0.5, "b": 0.2}, "layer")
    assert masks.shares == {"a": 0.5, "b": 0.2}  # c has no mask
    masks = choose(scores, 0.3, "global", apart={"c": 0.9})
    assert masks.shares["c"] == 0.9
    assert int(masks["a"].sum() + masks["b"].sum()) == 6
    with pytest.raises(UsageError, match="x is not one of the weights"):
        choose(scores, {"x": 0.5}, "layer")
    with pytest.raises(UsageError, match="goes with the allocation 'layer'"):
        choose(scores, {"a": 0.5}, "global")


def test_scores_that_are_not_finite_are_refused() -> None:
    with pytest.raises(UsageError, match="a: its scores are not finite"):
        choose({"a": torch.tensor([1.0, float("nan")])}, 0.5, "global")


# --------------------------------------------------------------------------------------------- masks as such


def test_applying_zeroes_the_rest_in_place_and_applied_in_a_copy() -> None:
    model = two_layers()
    masks = magnitude(model, 0.3)
    before = model[0].weight.detach().clone()
    copy = masks.applied(model)
    assert torch.equal(model[0].weight, before)
    assert torch.equal(copy[0].weight, before * masks["0.weight"])
    masks.apply(model)
    assert torch.equal(model[0].weight, copy[0].weight)


def test_masks_read_back_as_they_were_written(tmp_path: Path) -> None:
    masks = magnitude(two_layers(), 0.3)
    masks.write(tmp_path / "masks.safetensors")
    read = Masks.read(tmp_path / "masks.safetensors")
    assert read.keys() == masks.keys()
    assert all(torch.equal(read[name], masks[name]) for name in masks)
    assert read.digest == masks.digest


def test_weights_are_not_read_as_masks(tmp_path: Path) -> None:
    write_tensors(tmp_path / "weights.safetensors", {"a": torch.ones(2)})
    with pytest.raises(IntegrityError, match="not a mask"):
        Masks.read(tmp_path / "weights.safetensors")


def test_another_networks_masks_are_refused() -> None:
    masks = magnitude(two_layers(), 0.3)
    with pytest.raises(UsageError, match=r"no parameter 3\.weight"):
        masks.apply(nn.Sequential(nn.Conv2d(3, 8, 3)))
    with pytest.raises(UsageError, match=r"0\.weight is \(4, 3, 3, 3\) in the network"):
        masks.apply(nn.Sequential(nn.Conv2d(3, 4, 3)))


# ------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("recipe", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_masked_weights_stay_exactly_zero_through_every_step(recipe: Recipe) -> None:
    model = network()
    masks = magnitude(model, 0.4)
    zeros = Zeros(masks)
    trained = run(recipe=recipe, model=masks.apply(model), callbacks=[MaskedTraining(masks), zeros]).model
    assert zeros.steps == 18
    weights = dict(trained.named_parameters())
    for name, mask in masks.items():
        assert not weights[name][~mask].any()
        assert weights[name][mask].all()


def test_masked_training_is_that_of_a_network_that_multiplies_by_its_masks() -> None:
    masks = magnitude(network(), 0.4)
    trained = run(recipe=SGD, model=masks.apply(network()), callbacks=[MaskedTraining(masks)]).model
    multiplied = network()
    for number in (0, 5):
        prune.custom_from_mask(multiplied[number], "weight", masks[f"{number}.weight"])
    run(recipe=SGD, model=multiplied)
    for number in (0, 5):
        torch.testing.assert_close(trained[number].weight, multiplied[number].weight, rtol=1e-4, atol=1e-5)


def test_masks_that_were_not_applied_are_refused_before_the_first_step() -> None:
    masks = magnitude(network(), 0.4)
    with pytest.raises(UsageError, match="is not zero where its mask is"):
        run(model=network(), callbacks=[MaskedTraining(masks)])


def test_weights_come_back_without_the_masks() -> None:
    """Otherwise the tests above would show nothing."""
    masks = magnitude(network(), 0.4)
    trained: nn.Module = run(recipe=SGD, model=masks.apply(network())).model
    weight: Tensor = trained.get_parameter("5.weight")
    assert weight[~masks["5.weight"]].any()


def test_a_masked_training_that_was_interrupted_ends_with_the_same_weights(tmp_path: Path) -> None:
    masks = magnitude(network(), 0.4)

    def train(directory: Path, *others: Callback) -> nn.Module:
        callbacks = [MaskedTraining(masks), *others]
        return run(directory, SGD, masks.apply(network()), callbacks=callbacks).model

    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", SignalAt(8, signal.SIGINT))
    assert weights_hash(train(tmp_path / "parts")) == weights_hash(whole)
