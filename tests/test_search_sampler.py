from __future__ import annotations

import optuna
import pytest

from archsearch.errors import UnknownNameError, UsageError
from archsearch.search.sampler import SAMPLERS, distributions

SPACE = distributions(["one", "other"])


@pytest.mark.parametrize("name", ["QMCSampler", "optuna:QMCSampler", "optuna:NSGAIIISampler", "TPESampler"])
def test_any_sampler_of_optuna_has_its_class_as_a_name(name: str) -> None:
    study = optuna.create_study(direction="maximize", sampler=SAMPLERS[name](3))
    assert type(study.sampler).__name__ == name.removeprefix("optuna:")
    points = []
    for _ in range(4):
        trial = study.ask(SPACE)
        points.append(tuple(trial.params.values()))
        study.tell(trial, sum(points[-1]))
    assert len(set(points)) == 4


def test_a_sampler_that_takes_a_seed_gets_it() -> None:
    first, same, other = (
        optuna.create_study(sampler=SAMPLERS["optuna:RandomSampler"](seed)).ask(SPACE).params
        for seed in (1, 1, 2)
    )
    assert first == same != other


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("CmaEsSampler", "CmaEsSampler: unpickles what it finds in the study"),
        ("optuna:GridSampler", r"needs arguments \(search_space\)"),
        ("PartialFixedSampler", r"needs arguments \(fixed_params, base_sampler\)"),
        ("BaseSampler", "BaseSampler: cannot be used here: .*abstract"),
        ("BruteForceSampler", "BruteForceSampler: cannot be used here: .*step"),
    ],
)
def test_samplers_that_cannot_be_used_say_why(name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        SAMPLERS[name]


@pytest.mark.parametrize("name", ["optuna:QMC", "optuna:os", "qmc"])
def test_names_that_optuna_does_not_know_are_refused(name: str) -> None:
    with pytest.raises(UnknownNameError):
        SAMPLERS[name]
