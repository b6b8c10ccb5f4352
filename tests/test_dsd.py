from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from find_case import CountSteps
from torch import Tensor, nn
from training_case import RECIPE, network, source

from archsearch.cli import main
from archsearch.data import load_data
from archsearch.dsd import Dsd, Phases, dsd
from archsearch.errors import UsageError
from archsearch.rebuild import trace_module
from archsearch.recipe import RECIPES, Recipe
from archsearch.sparsity.masks import Masks
from archsearch.trainer import Trainer
from archsearch.training.callbacks import Callback, State

ROWS = RECIPES["quick"].with_(
    lr=0.02, optimizer="adam", nesterov=False, weight_decay=1e-4, clip_grad_norm=1.0, batch_size=128
)


class RowReader(nn.Module):
    """Read a digit row by row: 8 steps of 8 pixels."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, hidden: int = 24) -> None:
        super().__init__()
        self.rows = kind(8, hidden, batch_first=True)
        self.fc = nn.Linear(hidden, 10)

    def forward(self, images: Tensor) -> Tensor:
        states, _ = self.rows(images.squeeze(1))
        logits: Tensor = self.fc(states[:, -1])
        return logits


def read_rows(directory: Path, kind: type[nn.RNNBase] = nn.LSTM, **options: Any) -> Dsd:
    trainer = Trainer(load_data("digits"), "cpu", directory / "store")
    traced = trace_module(RowReader(kind), torch.randn(1, 1, 8, 8))
    return dsd(traced, Phases(**{"keep": 0.6, "recipe": ROWS.with_(epochs=2), **options}), trainer)


def small(directory: Path, *callbacks: Callback, out: bool = True, **options: Any) -> Dsd:
    trainer = Trainer(source(), "cpu", directory / "store", callbacks=lambda label, place: callbacks)
    traced = trace_module(network(dropout=0.0), torch.randn(1, 2, 6, 6))
    phases = Phases(**{"keep": 0.5, "recipe": RECIPE, **options})
    return dsd(traced, phases, trainer, out=directory / "out" if out else None)


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def check_phases(masks: Masks, dense: nn.Module, sparse: nn.Module, redense: nn.Module) -> None:
    """Check that the three phases did what they are for."""
    before, middle, after = map(parameters, (dense, sparse, redense))
    for name, mask in masks.items():
        assert (before[name] != 0).all()
        # Largest magnitudes of the dense phase stay.
        assert before[name][~mask].abs().max() <= before[name][mask].abs().min()
        # At the end of the sparse phase exactly the masked weights are zero, and the others have moved.
        assert torch.equal(middle[name] == 0, ~mask)
        assert (middle[name][mask] != before[name][mask]).float().mean() > 0.9
        # All of the network has moved in the last phase, and what was masked is not zero any more.
        assert (after[name] != middle[name]).float().mean() > 0.9
        assert (after[name][~mask] != 0).float().mean() > 0.9


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_recurrent_network_goes_through_all_three_phases(tmp_path: Path, kind: type[nn.RNNBase]) -> None:
    result = read_rows(tmp_path, kind, sparse_epochs=1, redense_epochs=1)
    run = result.runs[0]
    assert set(run.masks) == {"rows.weight_ih_l0", "rows.weight_hh_l0", "fc.weight"}
    for mask in run.masks.values():
        assert int(mask.sum()) == round(0.6 * mask.numel())
    check_phases(run.masks, run.dense.model, run.sparse.model, run.redense.model)
    assert [arm.epochs for arm in result.record.arms] == [2, 4, 4, 3, 4]


def test_a_convolutional_network_goes_through_all_three_phases(tmp_path: Path) -> None:
    run = small(tmp_path).runs[0]
    assert set(run.masks) == {"0.weight", "5.weight"}
    check_phases(run.masks, run.dense.model, run.sparse.model, run.redense.model)


class Rates(Callback):
    """Record the learning rate of every step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_step(self, state: State) -> None:
        self.rates.append(state.lr)


def test_the_sparse_phase_starts_the_schedule_again_and_the_last_has_a_tenth_of_its_rate(
    tmp_path: Path,
) -> None:
    rates = Rates()
    small(tmp_path, rates, out=False)
    one = 3 * 6
    whole, dense, sparse, redense, second, third = (
        rates.rates[first:last]
        for first, last in ((0, 3 * one), *((k * one, (k + 1) * one) for k in range(3, 8)))
    )
    assert len(rates.rates) == 8 * one
    assert dense == sparse == second
    assert redense == third == pytest.approx([rate / 10 for rate in dense])
    assert max(whole) == max(dense) == RECIPE.lr
    assert min(dense) > min(whole)  # one schedule over all


def test_phases_change_nothing_but_length_and_rate() -> None:
    recipe = Recipe(lr=0.2, weight_decay=3e-4, epochs=10, label_smoothing=0.1)
    phases = Phases(recipe=recipe, sparse_epochs=7, redense_epochs=5)
    assert phases.sparse == recipe.with_(epochs=7)
    assert phases.redense == recipe.with_(epochs=5, lr=0.2 / 10)
    assert phases.whole == recipe.with_(epochs=22)


def test_the_control_goes_through_the_same_phases_without_masks(tmp_path: Path) -> None:
    # Where everything is kept, dsd and its control are one and the same.
    arms = {arm.name: arm for arm in small(tmp_path, keep=1.0).record.arms}
    assert arms["dsd"].accuracies == arms["same phases, not pruned"].accuracies
    assert arms["sparse phase of dsd"].params == arms["dsd"].params


def test_the_record_counts_epochs_and_what_the_sparse_network_costs(tmp_path: Path) -> None:
    result = small(tmp_path, sparse_epochs=2, redense_epochs=1, seeds=2)
    arms = {arm.name: arm for arm in result.record.arms}
    assert {name: arm.epochs for name, arm in arms.items()} == {
        "dense": 3,
        "dense, as long": 6,
        "same phases, not pruned": 6,
        "sparse phase of dsd": 5,
        "dsd": 6,
    }
    assert {len(arm.accuracies) for arm in arms.values()} == {2}
    assert arms["dsd"].macs == 36 * 72 + 432
    assert arms["sparse phase of dsd"].macs == 36 * 36 + 216
    assert arms["dsd"].params - arms["sparse phase of dsd"].params == 36 + 216
    assert arms["dsd"].seconds > arms["sparse phase of dsd"].seconds > arms["dense"].seconds


def test_files_are_those_of_find_with_the_masks_beside_them(tmp_path: Path) -> None:
    result = small(tmp_path)
    names = ["architecture.yaml", "weights.safetensors", "masks.safetensors", "results.json", "results.md"]
    assert [path.name for path in result.files] == names
    arms = json.loads((tmp_path / "out" / "results.json").read_text())["arms"]
    assert arms[-1]["accuracies"] == list(result.record.arms[-1].accuracies)
    masks = Masks.read(tmp_path / "out" / "masks.safetensors")
    assert masks.digest == result.runs[0].masks.digest


def test_a_second_run_trains_nothing(tmp_path: Path) -> None:
    counter = CountSteps()
    first = small(tmp_path, counter)
    steps = counter.steps
    again = small(tmp_path, counter)
    assert counter.steps == steps
    assert again.record.arms == first.record.arms


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"keep": 0.0}, "--keep 0: must be a share"),
        ({"keep": 1.1}, "--keep 1.1: must be a share"),
        ({"sparse_epochs": 0}, "--sparse-epochs 0: at least 1"),
        ({"redense_epochs": -1}, "--redense-epochs -1: at least 1"),
        ({"seeds": 0}, "--seeds 0: at least 1"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        Phases(**options)


def test_the_command_writes_a_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "lenet_300_100", "--epochs", "1", "--keep", "0.8", "--store", str(tmp_path / "store")]
    assert main(["dsd", *words, "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "same phases, not pruned" in shown
    assert f"wrote {tmp_path / 'out' / 'results.md'}" in shown
    weights = str(tmp_path / "out" / "weights.safetensors")
    assert main(["evaluate", str(tmp_path / "out" / "architecture.yaml"), "--weights", weights]) == 0
    measured = json.loads((tmp_path / "out" / "results.json").read_text())["arms"][-1]["accuracies"][0]
    assert f"{measured:.2f} % of 359" in capsys.readouterr().out


@pytest.mark.slow
def test_dsd_of_an_lstm_is_as_good_as_its_dense_control_within_noise(tmp_path: Path) -> None:
    result = read_rows(tmp_path, recipe=ROWS.with_(epochs=10), keep=0.7, seeds=3)
    means = {arm.name: arm.mean or 0.0 for arm in result.record.arms}
    assert means["dsd"] > means["dense"] + 1
    # A seed deviates by about a point, a difference of two means of three by 0.8.
    assert abs(means["dsd"] - means["same phases, not pruned"]) < 2.5
