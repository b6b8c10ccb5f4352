"""What there is to choose from, as lines for the terminal."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from inspect import getdoc
from typing import Any

from archsearch.recipe import BUDGETS, RECIPES, Recipe
from archsearch.registry import Registry


def _models(pattern: str) -> Iterable[str]:
    from archsearch.models import list_models

    return list_models(pattern)


def _pruners(pattern: str) -> Iterable[str]:
    from archsearch.pruners import PRUNERS

    for name in PRUNERS.names(pattern):
        pruner = PRUNERS[name]
        needs = f"; needs {', '.join(pruner.needs)}" if pruner.needs else ""
        yield f"{name:<12} {_first_line(pruner)} [{pruner.source}; allocation {pruner.allocation}{needs}]"


def _allocations(pattern: str) -> Iterable[str]:
    from archsearch.allocation import ALLOCATIONS

    return _documented(ALLOCATIONS, pattern)


def _data(pattern: str) -> Iterable[str]:
    from archsearch.data import DATASETS

    return _documented(DATASETS, pattern)


def _recipes(pattern: str) -> Iterable[str]:
    for name in RECIPES.names(pattern):
        recipe = RECIPES[name]
        differing = {
            f.name: getattr(recipe, f.name) for f in fields(Recipe) if getattr(recipe, f.name) != f.default
        }
        always = {
            key: getattr(recipe, key) for key in ("optimizer", "lr", "batch_size", "epochs", "schedule")
        }
        yield f"{name:<10} {_spelled({**always, **differing})}"


def _budgets(pattern: str) -> Iterable[str]:
    for name in BUDGETS.names(pattern):
        budget = BUDGETS[name]
        epochs = "epochs" if budget.epochs_divisor == 1 else f"epochs / {budget.epochs_divisor}"
        facts = ["inherited weights" if budget.inherits else "fresh weights"]
        if not budget.epochs_divisor:
            facts.append("no training")
        else:
            facts.append(
                f"the recipe's {epochs}{' x FLOPs of the reference / own' if budget.stretch else ''}"
            )
            facts += [f"lr / {budget.lr_divisor}"] if budget.lr_divisor != 1 else []
            facts += [_spelled(budget.changes)] if budget.changes else []
        yield f"{name:<18} {', '.join(facts)}"


def _presets(pattern: str) -> Iterable[str]:
    from archsearch.presets import PRESETS

    for name in PRESETS.names(pattern):
        yield f"{name:<20} {PRESETS[name].model}"


def _criteria(pattern: str) -> Iterable[str]:
    from archsearch.sparsity.criteria import CRITERIA

    for name in CRITERIA.names(pattern):
        criterion = CRITERIA[name]
        facts = [criterion.source, "of trained weights" if criterion.trained else "of the initialisation"]
        needs = ["needs images"] if criterion.needs_batch else []
        yield f"{name:<12} {_first_line(criterion)} [{'; '.join([*facts, *needs])}]"


def _engines(pattern: str) -> Iterable[str]:
    from archsearch.search.engines import ENGINES

    return _documented(ENGINES, pattern)


def _samplers(pattern: str) -> Iterable[str]:
    from archsearch.search.sampler import MODEL, SAMPLERS

    about = {MODEL: "space-filling points, and an additive model of all values that recommends widths"}
    for name in sorted([MODEL, *SAMPLERS]):
        if fnmatch.fnmatchcase(name, pattern):
            yield f"{name:<14} {about.get(name, 'of Optuna, on projected points; recommends its best trial')}"


def _objectives(pattern: str) -> Iterable[str]:
    from archsearch.search.objectives import OBJECTIVES

    for name in OBJECTIVES.names(pattern):
        yield f"{name:<14} {OBJECTIVES[name].about}"


def _documented(registry: Registry[Any], pattern: str) -> Iterable[str]:
    for name in registry.names(pattern):
        thing = registry[name]
        about = getattr(getattr(thing, "__self__", None), "about", None)  # of one data set among a kind
        yield f"{name:<14} {about or _first_line(thing)}"


def _first_line(thing: object) -> str:
    return (getdoc(thing) or "").partition("\n")[0]


def _spelled(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_value(value)}" for name, value in values.items())


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_value, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value).lower()


CATALOGUES: Mapping[str, Callable[[str], Iterable[str]]] = {
    "models": _models,
    "pruners": _pruners,
    "allocations": _allocations,
    "data": _data,
    "recipes": _recipes,
    "budgets": _budgets,
    "presets": _presets,
    "criteria": _criteria,
    "samplers": _samplers,
    "objectives": _objectives,
    "engines": _engines,
}
