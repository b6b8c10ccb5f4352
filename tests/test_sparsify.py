from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from find_case import EPOCHS, MACS, PARAMS, STEPS
from sparsity_case import RECIPE, Start, traced_tiny, watched

from archsearch.errors import UsageError
from archsearch.rebuild import load
from archsearch.sparsity.masks import Masks
from archsearch.sparsity.rule import Rule
from archsearch.sparsity.sparsify import Sparsified, SparsityPlan, sparsify
from archsearch.tensor_files import write_tensors

PLACES = {"conv1.weight": 36, "conv2.weight": 9, "fc.weight": 1}
WEIGHTS = 144 + 1152 + 48


def mask(directory: Path, starts: list[Start] | None = None, **options: Any) -> Sparsified:
    plan: dict[str, Any] = {"keep": 0.25, "budget": "scratch-e", "recipe": RECIPE}
    verb = {name: options.pop(name) for name in ("weights", "say", "out") if name in options}
    return sparsify(
        traced_tiny(),
        SparsityPlan(**{**plan, **options}),
        watched(directory / "store", [] if starts is None else starts),
        **verb,
    )


def zeros(start: Start) -> int:
    return sum(int((start.weights[name] == 0).sum()) for name in PLACES)


def test_the_arms_are_the_reference_chance_fine_tuning_and_fresh_weights(tmp_path: Path) -> None:
    starts: list[Start] = []
    found = mask(tmp_path, starts)
    names = ["reference", "random mask, scratch-e", "magnitude, finetune", "magnitude, scratch-e"]
    assert [arm.name for arm in found.record.arms] == names
    reference, chance, tuned, scratch = found.record.arms
    assert (reference.macs, reference.params) == (MACS, PARAMS)
    sparse = sum(PLACES[name] * int(mask.sum()) for name, mask in found.masks.items())
    assert chance.macs == tuned.macs == scratch.macs == sparse
    assert chance.params == tuned.params == scratch.params == PARAMS - WEIGHTS + WEIGHTS // 4
    assert [arm.epochs for arm in found.record.arms] == [EPOCHS, EPOCHS, EPOCHS // 4, EPOCHS]
    assert [zeros(start) for start in starts] == [0] + 3 * [WEIGHTS - WEIGHTS // 4]
    for name, kept in found.masks.items():
        assert torch.equal(found.model.get_parameter(name) != 0, kept)


def test_fine_tuning_starts_from_the_trained_weights_and_scratch_from_fresh_ones(tmp_path: Path) -> None:
    starts: list[Start] = []
    trained = watched(tmp_path / "store", [])
    found = mask(tmp_path, starts)
    reference, chance, tuned, scratch = starts
    again = trained.train("reference", _loaded(reference), RECIPE, 0).model
    for name, kept in found.masks.items():
        assert torch.equal(tuned.weights[name], again.get_parameter(name) * kept)
        assert torch.equal(scratch.weights[name] != 0, kept)
        assert not torch.equal(scratch.weights[name], reference.weights[name] * kept)
        assert int((chance.weights[name] != 0).sum()) == int(kept.sum())
    assert any(not torch.equal(chance.weights[name] != 0, found.masks[name]) for name in PLACES)


def _loaded(start: Start) -> torch.nn.Module:
    model = traced_tiny().model
    model.load_state_dict(start.weights)
    return model


def test_scratch_b_trains_as_many_flops_counted_by_the_kept_weights(tmp_path: Path) -> None:
    found = mask(tmp_path, budget="scratch-b")
    scratch = found.record.arms[-1]
    assert scratch.epochs == EPOCHS * MACS // scratch.macs > EPOCHS
    capped = mask(tmp_path, budget="scratch-b", budget_cap=1.5)
    assert capped.record.arms[-1].epochs == 6


def test_methods_at_the_initialisation_train_the_weights_that_they_looked_at(tmp_path: Path) -> None:
    starts: list[Start] = []
    found = mask(tmp_path, starts, rule=Rule("snip"))
    names = ["reference", "random mask, scratch-e", "snip, its initialisation, scratch-e", "snip, scratch-e"]
    assert [arm.name for arm in found.record.arms] == names
    reference, _, own, _ = starts
    for name, kept in found.masks.items():
        assert torch.equal(own.weights[name], reference.weights[name] * kept)
    assert len(mask(tmp_path, rule=Rule("random")).record.arms) == 3


def test_steps_take_the_same_share_each_and_recover_in_between(tmp_path: Path) -> None:
    starts: list[Start] = []
    found = mask(tmp_path, starts, steps=2, recover=2, budget="finetune", rule=Rule(allocation="layer"))
    reference, recovery, tuned = starts
    assert (reference.steps, recovery.steps, tuned.steps) == (EPOCHS * STEPS, 2 * STEPS, STEPS)
    half = sum(round(n * 0.5) for n in (144, 1152, 48))
    assert WEIGHTS - zeros(recovery) == half
    for name, kept in found.masks.items():
        assert (recovery.weights[name][kept] != 0).all()  # what stays at the end stayed before
    assert found.masks.kept == WEIGHTS // 4


def test_each_seed_has_masks_of_its_own_and_the_table_their_mean_cost(tmp_path: Path) -> None:
    found = mask(tmp_path, seeds=2)
    assert all(len(arm.accuracies) == 2 for arm in found.record.arms)
    other = mask(tmp_path, seed=1)
    assert other.masks.digest != found.masks.digest
    one, two = mask(tmp_path).record.arms[-1], other.record.arms[-1]
    assert found.record.arms[-1].macs == round((one.macs + two.macs) / 2)
    assert found.record.arms[-1].accuracies == (*one.accuracies, *two.accuracies)


def test_the_same_run_again_trains_nothing_and_shares_the_reference_with_others(tmp_path: Path) -> None:
    starts: list[Start] = []
    mask(tmp_path, starts)
    assert len(starts) == 4
    mask(tmp_path, starts)
    assert len(starts) == 4
    mask(tmp_path, starts, keep=0.5)
    assert [start.label for start in starts[4:]] == [
        "random mask, scratch-e",
        "magnitude, finetune",
        "magnitude, scratch-e",
    ]


def test_the_files_hold_the_network_its_masks_and_the_results(tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = mask(tmp_path, out=out)
    names = ["architecture.yaml", "masks.safetensors", "weights.safetensors", "results.json", "results.md"]
    assert [path.relative_to(out).as_posix() for path in found.files] == names
    assert Masks.read(out / "masks.safetensors").digest == found.masks.digest
    model = load(out / "architecture.yaml", out / "weights.safetensors", trust_code=True)
    state = model.state_dict()
    assert all(torch.equal(value.cpu(), state[name]) for name, value in found.model.state_dict().items())
    conditions = json.loads((out / "results.json").read_text())["conditions"]
    assert (conditions["method"], conditions["keep"], conditions["allocation"]) == (
        "magnitude",
        0.25,
        "global",
    )


def test_given_weights_are_masked_without_training(tmp_path: Path) -> None:
    traced = traced_tiny()
    torch.manual_seed(7)
    weights = {
        name: torch.rand(value.shape) + 0.1 if value.is_floating_point() else value
        for name, value in traced.model.state_dict().items()
    }
    write_tensors(tmp_path / "given.safetensors", weights)
    plan = SparsityPlan(keep=0.5, budget="none")
    found = sparsify(traced, plan, None, weights=str(tmp_path / "given.safetensors"))
    assert [arm.name for arm in found.record.arms] == ["reference", "magnitude, not trained"]
    for name, kept in found.masks.items():
        assert torch.equal(found.model.get_parameter(name), weights[name] * kept)
    assert traced.model.get_parameter("conv2.weight").all()


def test_emptied_layers_are_told_about(tmp_path: Path) -> None:
    traced = traced_tiny()
    with torch.no_grad():
        traced.model.fc.weight.mul_(1e-6)
    said: list[str] = []
    found = sparsify(traced, SparsityPlan(keep=0.2, budget="none"), None, say=said.append)
    assert found.masks.lifted == ("fc.weight",)
    assert any("one threshold would have emptied 1 layers" in line and "fc.weight" in line for line in said)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, "--keep 0: must be a share"),
        ({"keep": float("nan")}, "--keep nan: must be a share"),
        ({"steps": 0}, "--steps 0: at least 1"),
        ({"images": 0}, "--images 0: at least 1"),
        ({"finetune": "scratch-e"}, "does not fine-tune"),
        ({"rule": Rule("snip"), "budget": "finetune"}, "there is nothing to fine-tune"),
        ({"budget_cap": 0.5}, "cap must be a number of at least 1"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SparsityPlan(**{"keep": 0.5, **options})


def test_training_without_data_is_refused() -> None:
    with pytest.raises(UsageError, match="--budget scratch-b trains networks: give --data"):
        sparsify(traced_tiny(), SparsityPlan(keep=0.5), None)
    with pytest.raises(UsageError, match="snip looks at training images: give --data"):
        sparsify(traced_tiny(), SparsityPlan(keep=0.5, budget="none", rule=Rule("snip")), None)
