from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from find_case import EPOCHS, FACTORY, MACS, PARAMS, RECIPE, CountSteps, search
from tiny_net import TinyNet, tiny
from torch import nn
from training_case import CLASSES, source

import archsearch
from archsearch.api import default_recipe, published_weights, shape_and_arguments
from archsearch.data import DATASETS, DataSource
from archsearch.errors import IntegrityError, SpecError, UnknownNameError, UsageError
from archsearch.models import resolve
from archsearch.pipeline import Found
from archsearch.recipe import RECIPES
from archsearch.space import Bounds, SearchSpace


def _find(**options: Any) -> Found:
    return archsearch.find(
        **{"model": FACTORY, "trust_code": True, "data": None, "budget": "none", **options}
    )


def test_a_network_in_hand_is_pruned_trained_and_left_as_it_was(tmp_path: Path) -> None:
    model = TinyNet(CLASSES, 2).train()
    model.bn2.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = search(tmp_path, model=model, budget="scratch-e")
    assert [arm.budget for arm in found.record.arms] == ["reference", "scratch-e", "finetune", "scratch-e"]
    assert found.record.arms[0].epochs == 0  # its weights are trained ones
    assert (model.training, model.bn1.training, model.bn2.training) == (True, True, False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    small = archsearch.load(tmp_path / "out" / "architecture.yaml", factory=lambda: tiny())
    assert sum(p.numel() for p in small.parameters()) == found.record.arms[-1].params


def test_a_network_in_hand_with_untrained_weights_is_drawn_afresh_and_trained(tmp_path: Path) -> None:
    model = TinyNet(CLASSES, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = search(tmp_path, model=model, trained=False)
    assert found.record.arms[0].epochs > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_network_in_hand_without_data_needs_an_example_and_takes_any() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(UsageError, match="data, or example"):
        _find(model=model, params=0.6)
    found = _find(model=model, params=0.6, example=torch.zeros(1, 5))
    assert found.record.arms[1].params == 4 * 5 + 4 + 2 * 4 + 2  # half of the hidden units


@pytest.mark.parametrize("resource", ["flops", "params", "memory"])
def test_every_target_is_met(resource: str) -> None:
    found = _find(**{resource: "60%"})
    cost = found.architecture.cost
    part = {"flops": cost.macs, "params": cost.params, "memory": cost.peak_activation_bytes}[resource]
    assert part is not None
    assert 0 < part.value <= 0.6 * part.reference


def test_several_targets_hold_together_and_a_space_is_respected() -> None:
    space = SearchSpace(bounds=Bounds(round_to=4), ignore=("conv1",))
    found = _find(flops=0.9, params="800", space=space)
    cost = found.architecture.cost
    assert cost.macs is not None
    assert cost.params is not None
    assert cost.macs.value <= 0.9 * MACS
    assert cost.params.value <= 800 < PARAMS
    widths = {name: group.width for name, group in found.architecture.widths.items()}
    assert widths["conv1"] == 8
    assert widths["conv2"] in (4, 8)


def test_a_preset_implies_its_model_and_is_named_in_the_file() -> None:
    found = archsearch.find(preset="resnet56-a", data=None, budget="none")
    assert found.architecture.model == "resnet56"
    assert found.architecture.provenance["target"] == "resnet56-a"
    assert found.architecture.cost.macs is not None
    assert found.architecture.cost.macs.value == 112_435_840
    assert found.record.arms[1].name == "resnet56-a, not trained"


def test_conditions_that_no_file_can_hold_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="provenance: a text must have at most 1024 characters"):
        search(tmp_path, conditions={"note": "x" * 1025})
    assert not (tmp_path / "store").exists()


def test_the_record_says_how_it_was_trained_only_if_it_was(tmp_path: Path) -> None:
    assert "recipe" not in _find(flops=0.5).record.conditions
    trained = search(tmp_path, budget="none", recipe="cifar", recipe_changes={"epochs": 1}).record
    assert trained.conditions["recipe"] == {"epochs": 1}  # all else is as published
    assert trained.conditions["data"] == "in-memory"
    assert trained.conditions["model"].endswith("tiny_net.py:tiny")


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({}, UsageError, "nothing says how small"),
        ({"model": None, "flops": 0.5}, UsageError, "no model"),
        ({"model": "resnet65", "flops": 0.5}, UnknownNameError, "did you mean resnet56"),
        ({"model": "resnet20", "preset": "resnet56-a"}, UsageError, "is for --model resnet56, not resnet20"),
        ({"model": TinyNet(3, 2), "preset": "resnet56-a"}, UsageError, "not TinyNet"),
        ({"preset": "resnet56-c"}, UnknownNameError, "did you mean resnet56-"),
        ({"flops": 0.5, "device": "cuda:77"}, UsageError, "there is no 'cuda:77' here"),
        ({"flops": 0.5, "weights": "/no/such.pt"}, UsageError, r"--weights /no/such\.pt: there is no such"),
        ({"flops": 0.5, "recipe": "quik"}, UnknownNameError, "did you mean quick"),
        ({"flops": 0.5, "recipe_changes": {"epoch": 1}}, UsageError, "did you mean epochs"),
        ({"flops": 0.5, "classes": 0}, UsageError, "num_classes is 0: it must be 1 or more"),
        ({"flops": 0.5, "budget": "scratch-e"}, UsageError, "give --data, or --budget none"),
        ({"flops": 0.5, "trust_code": False}, UsageError, "--trust-code"),
        ({"flops": 0.5, "arguments": {"depth": 3}}, UsageError, "takes no argument 'depth'"),
        ({"flops": 0.5, "space": SearchSpace(ignore=("layer9",))}, UsageError, "'layer9' matches no layer"),
    ],
)
def test_what_cannot_be_is_refused_with_what_would_do(
    options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        _find(**options)


def test_names_are_checked_before_data_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def unread(request: object) -> DataSource:
        raise AssertionError("the data was read")

    monkeypatch.setitem(DATASETS._things, "digits", unread)
    wrong_words: list[dict[str, Any]] = [
        {"model": "resnet65"},
        {"model": "resnet20", "weights": "/no/such.pt"},
        {"model": "resnet20", "method": "l1"},
        {"model": "resnet20", "recipe_changes": {"lr": -1}},
        {"model": "resnet20", "device": "cuda:77"},
    ]
    for wrong in wrong_words:
        with pytest.raises(UsageError):
            archsearch.find(**{"flops": 0.5, **wrong})


def test_too_few_outputs_for_the_data_are_refused_before_training(tmp_path: Path) -> None:
    steps = CountSteps()
    with pytest.raises(UsageError, match=re.escape(f"has 2 outputs, but in-memory has {CLASSES} classes")):
        search(tmp_path, classes=2, callbacks=lambda label, directory: [steps])
    assert steps.steps == 0


def test_weights_of_another_network_are_refused_before_training(tmp_path: Path) -> None:
    other = tmp_path / "other.pt"
    torch.save(nn.Linear(2, 2).state_dict(), other)
    with pytest.raises(IntegrityError, match=r"other\.pt"):
        search(tmp_path, weights=str(other))
    assert not (tmp_path / "store").exists()


def test_names_of_published_weights_are_for_libraries_only() -> None:
    assert published_weights(resolve("torchvision/resnet18"), "DEFAULT") == "DEFAULT"
    assert published_weights(resolve("resnet20"), None) is None
    with pytest.raises(UsageError, match="there is no such file"):
        published_weights(resolve("resnet20"), "DEFAULT")


def test_shape_and_classes_come_from_the_user_then_the_data_then_the_model() -> None:
    net, data = resolve("resnet20"), source()
    assert shape_and_arguments(net, None, None, None, None)[0] == (3, 32, 32)
    shape, words = shape_and_arguments(net, data, None, None, {"shortcut": "B"})
    assert shape == (2, 6, 6)
    assert words == {"num_classes": CLASSES, "in_channels": 2, "shortcut": "B"}
    shape, words = shape_and_arguments(net, data, (1, 8, 8), 7, None)
    assert (shape, words["num_classes"], words["in_channels"]) == ((1, 8, 8), 7, 1)


def test_every_data_set_has_a_recipe_by_default() -> None:
    assert {default_recipe(name) for name in [*DATASETS, "your own"]} <= set(RECIPES)
    assert default_recipe("digits") == "quick"
    assert default_recipe("cifar10") == "cifar"


def test_the_epochs_of_a_run_are_those_of_its_recipe(tmp_path: Path) -> None:
    found = search(tmp_path, budget="none", recipe=RECIPE, recipe_changes={"epochs": EPOCHS - 2})
    assert found.record.arms[0].epochs == EPOCHS - 2
