from __future__ import annotations

import json
import subprocess
import sys
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from archsearch.errors import UnknownNameError, UsageError
from archsearch.recipe import BUDGETS, RECIPES, Budget, Recipe


def test_importing_recipes_does_not_import_torch() -> None:
    code = "import sys, archsearch.recipe; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_cifar_recipe_is_the_published_one() -> None:
    # Liu et al., ICLR 2019: 160 epochs, batch 64, SGD .1, momentum .9, decay 1e-4, x.1 at 50 % and 75 %.
    recipe = RECIPES["cifar"]
    assert (recipe.epochs, recipe.batch_size, recipe.optimizer) == (160, 64, "sgd")
    assert (recipe.momentum, recipe.weight_decay, recipe.nesterov) == (0.9, 1e-4, False)
    rates = [recipe.learning_rate(epoch, 160) for epoch in (0, 79, 80, 119, 120, 159)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rel=1e-12)


def test_the_imagenet_recipe_drops_at_each_third() -> None:
    recipe = RECIPES["imagenet"]
    assert (recipe.epochs, recipe.batch_size) == (90, 256)
    rates = [recipe.learning_rate(epoch, 90) for epoch in (0, 29, 30, 59, 60, 89)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rel=1e-12)


@given(st.integers(1, 2000), st.data())
def test_a_stretched_step_schedule_drops_at_the_published_whole_epochs(
    epochs: int, data: st.DataObject
) -> None:
    epoch = data.draw(st.integers(0, epochs - 1))
    done = data.draw(st.floats(0, 1, exclude_max=True))
    published = 0.1
    for milestone in (int(0.5 * epochs), int(0.75 * epochs)):
        published *= 0.1 if epoch >= milestone else 1
    assert RECIPES["cifar"].learning_rate(epoch, epochs, done) == pytest.approx(published, rel=1e-9)


def test_a_cosine_falls_from_the_peak_through_a_half_towards_nothing() -> None:
    recipe = Recipe(schedule="cosine", lr=0.4)
    assert recipe.learning_rate(0, 10) == 0.4
    assert recipe.learning_rate(5, 10) == pytest.approx(0.2)
    assert recipe.learning_rate(9, 10, 0.999) < 1e-6


def test_a_warm_up_rises_from_a_tenth_and_joins_the_cosine_without_a_jump() -> None:
    recipe = Recipe(schedule="cosine", lr=0.4, warmup=0.2)
    assert recipe.learning_rate(0, 10) == pytest.approx(0.04)
    assert recipe.learning_rate(1, 10) == pytest.approx(0.22)
    assert recipe.learning_rate(1, 10, 0.9999) == pytest.approx(0.4, rel=1e-3)
    assert recipe.learning_rate(2, 10) == pytest.approx(0.4)
    assert recipe.learning_rate(6, 10) == pytest.approx(0.2)


@given(st.sampled_from(RECIPES.names()), st.integers(1, 300), st.floats(0, 1, exclude_max=True), st.data())
def test_every_rate_of_every_recipe_lies_above_nothing_and_at_most_at_the_peak(
    name: str, epochs: int, done: float, data: st.DataObject
) -> None:
    recipe = RECIPES[name]
    rate = recipe.learning_rate(data.draw(st.integers(0, epochs - 1)), epochs, done)
    assert 0 <= rate <= recipe.lr * (1 + 1e-12)


def test_a_recipe_is_overridden_field_by_field_with_values_or_with_text() -> None:
    recipe = RECIPES["cifar"].with_(
        epochs=3, lr="0.05", nesterov="true", milestones="0.25,0.5", precision="bf16"
    )
    assert recipe == Recipe(epochs=3, lr=0.05, nesterov=True, milestones=(0.25, 0.5), precision="bf16")
    assert RECIPES["cifar"].epochs == 160


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epoch": 3}, r"unknown field 'epoch': did you mean epochs\?"),
        ({"zzz": 3}, r"unknown field 'zzz': known: optimizer, lr"),
        ({"epochs": 0}, r"epochs must be a whole number of at least 1, not 0"),
        ({"epochs": 2.5}, r"epochs must be a whole number of at least 1, not 2\.5"),
        ({"epochs": True}, r"epochs must be"),
        ({"epochs": "many"}, r"epochs must be a whole number of at least 1, not 'many'"),
        ({"lr": 0}, r"lr must be a number in \(0, inf\), not 0"),
        ({"lr": "nan"}, r"lr must be a number in \(0, inf\), not nan"),
        ({"lr": float("inf")}, r"lr must be"),
        ({"momentum": 1.0}, r"momentum must be a number in \[0, 1\), not 1\.0"),
        ({"nesterov": "maybe"}, r"nesterov must be true or false, not 'maybe'"),
        ({"nesterov": True, "momentum": 0.0}, r"nesterov needs a momentum above 0"),
        ({"schedule": "poly"}, r"schedule must be one of step, cosine, constant, not 'poly'"),
        ({"milestones": (0.75, 0.5)}, r"milestones must be rising shares"),
        ({"milestones": "80,120"}, r"milestones must be rising shares"),
        ({"precision": "int8"}, r"precision must be one of fp32, bf16, fp16"),
    ],
)
def test_a_bad_field_names_itself_and_its_rule(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RECIPES["cifar"].with_(**changes)


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean cifar"):
        RECIPES["cifr"]


@given(st.sampled_from(RECIPES.names()))
def test_a_recipe_survives_json(name: str) -> None:
    fields = json.loads(json.dumps(RECIPES[name].as_dict()))
    fields["milestones"] = tuple(fields["milestones"])
    assert Recipe(**fields) == RECIPES[name]


@pytest.mark.parametrize(
    ("ratio", "epochs"), [("1.3791", 220), ("1.5190", 243), ("1.1157", 178), ("1.1883", 190)]
)
def test_scratch_b_gives_the_published_epochs(ratio: str, epochs: int) -> None:
    # ResNet-56-B, VGG-16-A, ResNet-56-A, ResNet-110-A of the released code, from 160 epochs.
    cost = Fraction(ratio)
    assert BUDGETS["scratch-b"].epochs(160, cost.numerator, cost.denominator) == epochs


def test_scratch_b_is_exact_where_floats_lose_an_epoch() -> None:
    assert int(98 * (1 / 49)) == 1  # the float product is 1.9999999999999998
    assert BUDGETS["scratch-b"].epochs(98, 10**15, 49 * 10**15) == 2


@given(st.integers(1, 400), st.integers(1, 10**12), st.integers(1, 10**12))
def test_scratch_b_never_trains_for_more_flops_than_the_reference(epochs: int, full: int, share: int) -> None:
    pruned = min(full, share)
    found = BUDGETS["scratch-b"].epochs(epochs, full, pruned)
    assert found >= epochs
    assert found * pruned <= epochs * full < (found + 1) * pruned


def test_scratch_b_can_be_capped_as_published_for_imagenet() -> None:
    assert Budget(stretch=True, cap=2).epochs(90, 3, 1) == 180
    assert Budget(stretch=True, cap=2).epochs(90, 3, 2) == 135


@pytest.mark.parametrize("costs", [(0, 1), (1, 0), (-1, 1), (float("inf"), 1), (float("nan"), 1)])
def test_a_cost_that_cannot_be_is_refused(costs: tuple[float, float]) -> None:
    with pytest.raises(UsageError, match="a cost must be positive and finite"):
        BUDGETS["scratch-b"].epochs(160, *costs)


def test_a_cap_below_one_is_refused() -> None:
    with pytest.raises(UsageError, match="cap must be a number of at least 1"):
        Budget(stretch=True, cap=0.5)


def test_the_budgets_change_the_recipe_as_they_say() -> None:
    recipe = RECIPES["cifar"]
    assert BUDGETS["scratch-e"].recipe(recipe, 2, 1) == recipe
    assert BUDGETS["scratch-b"].recipe(recipe, 2, 1) == recipe.with_(epochs=320)
    assert BUDGETS["finetune"].recipe(recipe) == recipe.with_(epochs=40, lr=0.01)
    published = BUDGETS["finetune-published"].recipe(recipe)
    assert (published.epochs, published.lr) == (40, 0.001)
    assert {published.learning_rate(epoch, 40) for epoch in range(40)} == {0.001}
    assert BUDGETS["none"].epochs(160) == 0
    with pytest.raises(UsageError, match="trains nothing"):
        BUDGETS["none"].recipe(recipe)


def test_a_budget_of_few_epochs_still_trains_one() -> None:
    assert BUDGETS["finetune"].epochs(2) == 1
