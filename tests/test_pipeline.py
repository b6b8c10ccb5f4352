from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
import torch
import yaml
from find_case import ENVIRONMENT, EPOCHS, MACS, PARAMS, RECIPE, STEPS, CountSteps, search
from torch import nn
from training_case import source

from archsearch import files
from archsearch.architecture import Architecture
from archsearch.errors import InfeasibleError, SpecError, UsageError
from archsearch.models import resolve
from archsearch.pipeline import find
from archsearch.plan import Plan
from archsearch.presets import PRESETS
from archsearch.rebuild import load, trace_source
from archsearch.recipe import Recipe
from archsearch.results import Arm, Record
from archsearch.targets import Target
from archsearch.tensor_files import read_tensors
from archsearch.trainer import Trained, Trainer

PUBLISHED = yaml.safe_load((Path(__file__).parent / "data" / "presets.yaml").read_text())


def test_a_run_compares_reference_uniform_fine_tuned_and_from_scratch(tmp_path: Path) -> None:
    found = search(tmp_path)
    reference, uniform, tuned, scratch = found.record.arms
    assert [arm.name for arm in found.record.arms] == [
        "reference",
        "uniform, scratch-b",
        "l1_norm, finetune",
        "l1_norm, scratch-b",
    ]
    assert (reference.macs, reference.params) == (MACS, PARAMS)
    assert tuned.macs == scratch.macs <= MACS // 2
    assert uniform.macs <= MACS // 2
    assert reference.epochs == EPOCHS
    assert tuned.epochs == EPOCHS // 4
    assert scratch.epochs == EPOCHS * MACS // scratch.macs
    assert uniform.epochs == EPOCHS * MACS // uniform.macs
    assert all(0 <= arm.accuracies[0] <= 100 and arm.seconds > 0 for arm in found.record.arms)
    assert scratch.params == sum(p.numel() for p in found.model.parameters())


def test_the_fine_tuned_arm_can_be_left_out(tmp_path: Path) -> None:
    arms = search(tmp_path, budget="scratch-e", finetune="none").record.arms
    assert [arm.name for arm in arms] == ["reference", "uniform, scratch-e", "l1_norm, scratch-e"]


def test_a_run_names_the_files_that_it_wrote_and_they_agree_with_what_it_returns(tmp_path: Path) -> None:
    found = search(tmp_path, conditions={"command": "archsearch find"})
    out = tmp_path / "out"
    names = ["architecture.yaml", "weights.safetensors", "results.json", "results.md"]
    assert [path.relative_to(out).as_posix() for path in found.files] == names
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    results = files.read_json(out / "results.json")
    arms = [Arm(**{**arm, "accuracies": tuple(arm["accuracies"])}) for arm in results["arms"]]
    assert Record(results["conditions"], arms) == found.record
    assert results["conditions"]["command"] == "archsearch find"
    assert results["conditions"]["recipe"]["epochs"] == EPOCHS
    table = (out / "results.md").read_text()
    assert all(f"| {arm.name} |" in table for arm in arms)
    assert Architecture.read(out / "architecture.yaml") == found.architecture
    weights = read_tensors(out / "weights.safetensors")
    state = found.model.state_dict()
    assert weights.keys() == state.keys()
    assert all(torch.equal(weights[name], state[name].cpu()) for name in state)


def test_the_same_run_again_trains_nothing_and_says_so(tmp_path: Path) -> None:
    said: list[str] = []
    steps = CountSteps()
    options: dict[str, Any] = {"callbacks": lambda label, directory: [steps], "say": said.append}
    first = search(tmp_path, **options)
    trainings = (tmp_path / "store" / "trainings").glob("*/result.json")
    assert steps.steps == STEPS * sum(files.read_json(path)["epochs"] for path in trainings)
    assert steps.steps > 2 * STEPS * EPOCHS
    before = {path: path.read_bytes() for path in first.files}
    steps.steps = 0
    said.clear()
    again = search(tmp_path, **options)
    assert steps.steps == 0
    assert sum("trained before, read from" in line for line in said) == 4
    assert again.record == first.record
    assert {path: path.read_bytes() for path in again.files} == before


def test_another_target_trains_the_reference_no_second_time(tmp_path: Path) -> None:
    said: list[str] = []
    search(tmp_path)
    search(tmp_path, flops=0.3, say=said.append)
    reused = [line.partition(":")[0] for line in said if "trained before" in line]
    assert reused[0] == "reference"
    assert "l1_norm, finetune" not in reused


@pytest.mark.parametrize(
    ("budget", "names", "epochs"),
    [
        ("none", ["reference", "l1_norm, not trained"], [EPOCHS, 0]),
        ("finetune", ["reference", "l1_norm, finetune"], [EPOCHS, EPOCHS // 4]),
        (
            "scratch-e",
            ["reference", "uniform, scratch-e", "l1_norm, finetune", "l1_norm, scratch-e"],
            [EPOCHS, EPOCHS, EPOCHS // 4, EPOCHS],
        ),
    ],
)
def test_a_budget_decides_the_arms_and_their_epochs(
    tmp_path: Path, budget: str, names: list[str], epochs: list[int]
) -> None:
    arms = search(tmp_path, budget=budget).record.arms
    assert [arm.name for arm in arms] == names
    assert [arm.epochs for arm in arms] == epochs


def test_without_data_and_budget_nothing_is_trained_and_the_architecture_is_written(tmp_path: Path) -> None:
    said: list[str] = []
    found = search(tmp_path, budget="none", data=None, say=said.append)
    assert [arm.accuracies for arm in found.record.arms] == [(), ()]
    assert any("fresh random weights" in line for line in said)
    assert not (tmp_path / "store").exists()
    assert {path.name for path in found.files} == {"architecture.yaml", "results.json", "results.md"}
    small = load(tmp_path / "out" / "architecture.yaml", trust_code=True)
    assert sum(p.numel() for p in small.parameters()) == found.record.arms[1].params


def test_several_seeds_give_mean_and_sample_deviation(tmp_path: Path) -> None:
    found = search(tmp_path, seeds=2, budget="scratch-e")
    for arm in found.record.arms:
        assert len(arm.accuracies) == 2
        a, b = arm.accuracies
        assert arm.mean == pytest.approx((a + b) / 2)
        assert arm.deviation == pytest.approx(abs(a - b) / 2**0.5)  # the sample deviation of two numbers
        assert arm.deviation == pytest.approx(stdev(arm.accuracies))
    # The second seed is what a run with that seed alone trains.
    alone = search(tmp_path, seed=1, budget="scratch-e")
    assert alone.record.arms[0].accuracies == found.record.arms[0].accuracies[1:]


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    script = Path(__file__).with_name("find_case.py")
    step = STEPS + 3  # in the middle of the second epoch of the second arm
    command = [sys.executable, str(script), str(tmp_path), str(step)]
    run = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == [0, -9, 0], run.stderr
    for name in ("architecture.yaml", "weights.safetensors"):
        peaceful, interrupted = (tmp_path / kind / "out" / name for kind in ("peaceful", "interrupted"))
        assert peaceful.read_bytes() == interrupted.read_bytes()
    accuracies = [
        [arm["accuracies"] for arm in files.read_json(tmp_path / kind / "out" / "results.json")["arms"]]
        for kind in ("peaceful", "interrupted")
    ]
    assert accuracies[0] == accuracies[1]


def test_an_impossible_target_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    steps = CountSteps()
    with pytest.raises(InfeasibleError, match=r"flops 0\.0001.*smallest allowed widths have"):
        search(tmp_path, flops=0.0001, callbacks=lambda label, directory: [steps])
    assert steps.steps == 0
    assert not (tmp_path / "store").exists()


def test_given_weights_stand_in_for_training_the_reference(tmp_path: Path) -> None:
    trained = search(tmp_path / "first", flops=1.0, budget="scratch-e")
    weights = str(tmp_path / "first" / "out" / "weights.safetensors")
    found = search(tmp_path / "second", weights=weights, budget="none")
    reference = found.record.arms[0]
    assert reference.epochs == 0
    assert reference.accuracies == trained.record.arms[-1].accuracies
    assert not (tmp_path / "second" / "store").exists()


def test_the_pruned_network_inherits_the_kept_slices_of_the_reference(tmp_path: Path) -> None:
    reference = search(tmp_path / "first", flops=1.0, budget="scratch-e").model.cpu()
    weights = str(tmp_path / "first" / "out" / "weights.safetensors")
    found = search(tmp_path / "second", weights=weights, budget="none", allocation="local")
    kept = torch.as_tensor(found.selection["conv1"])
    small = found.model.cpu()
    assert torch.equal(small.get_parameter("conv1.weight"), reference.get_parameter("conv1.weight")[kept])
    norms = reference.get_parameter("conv1.weight").abs().sum((1, 2, 3))
    assert set(kept.tolist()) == set(norms.topk(len(kept)).indices.tolist())


def test_an_edited_or_foreign_architecture_in_the_way_is_not_overwritten_unseen(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "architecture.yaml").write_text("something: else\n")
    with pytest.raises(SpecError, match=r"architecture\.yaml"):
        search(tmp_path, budget="none", data=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ()}, "nothing says how small"),
        ({"preset": PRESETS["resnet56-a"]}, "a --preset has its own widths"),
        ({"seeds": 0}, "--seeds 0: at least 1"),
        ({"budget": "scratch-c"}, "unknown budget 'scratch-c': did you mean scratch-"),
        ({"method": "l1_nrom"}, "unknown pruner 'l1_nrom': did you mean l1_norm"),
        ({"allocation": "globl"}, "unknown allocation 'globl': did you mean global"),
        ({"finetune": "scratch-b"}, "does not fine-tune; give finetune or finetune-published or none"),
        ({"budget_cap": 0.5}, "cap must be a number of at least 1"),
        ({"budget_cap": float("nan")}, "cap must be a number of at least 1"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_when_it_is_made(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Plan(**{"targets": [Target.parse("flops", 0.5)], **changes})


@dataclass(frozen=True)
class Rehearsing(Trainer):
    """Only notes what it would train."""

    notes: dict[str, Recipe] = field(default_factory=dict)

    def train(self, label: str, model: nn.Module, recipe: Recipe, seed: int) -> Trained:
        self.notes[label] = recipe
        return Trained(model, 0.0, recipe.epochs, 0.0)


def _epochs(name: str, **changes: Any) -> dict[str, int]:
    preset = PRESETS[name]
    trainer = Rehearsing(source(), "cpu", Path("unused"))
    plan = Plan(preset=preset, recipe=Recipe(), **changes)
    find(trace_source(resolve(preset.model), {}, (3, 32, 32)), plan, trainer)
    return {label: recipe.epochs for label, recipe in trainer.notes.items()}


@pytest.mark.parametrize("name", ["vgg16-a", "resnet56-a", "resnet56-b", "resnet110-a"])
def test_scratch_b_by_the_published_count_trains_as_long_as_published(name: str) -> None:
    epochs = _epochs(name, published_cost=True)
    assert epochs["reference"] == 160
    assert epochs[f"{name}, finetune"] == 40
    assert epochs[f"{name}, scratch-b"] == PUBLISHED[name]["scratch_b_epochs"]


def test_scratch_b_counts_macs_by_default_and_can_be_capped() -> None:
    assert _epochs("resnet56-b")["resnet56-b, scratch-b"] == 160 * 125_485_696 // 90_907_264 == 220
    assert _epochs("vgg16-a")["vgg16-a, scratch-b"] == 160 * 313_463_808 // 206_279_680 == 243
    assert _epochs("resnet56-b", budget_cap=1.25)["resnet56-b, scratch-b"] == 200


def test_uniform_widths_beside_a_preset_cost_no_more_than_it() -> None:
    preset = PRESETS["resnet56-b"]
    traced = trace_source(resolve("resnet56"), {}, (3, 32, 32))
    found = find(traced, Plan(preset=preset, recipe=RECIPE), Rehearsing(source(), "cpu", Path("unused")))
    uniform, given = found.record.arms[1], found.record.arms[3]
    assert given.macs == 90_907_264
    assert 0.99 * given.macs <= uniform.macs <= given.macs
