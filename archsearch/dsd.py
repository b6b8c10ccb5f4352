"""Dense, sparse, dense: a network is trained, pruned and trained, and grown again (Han et al., ICLR 2017).

Nothing gets smaller: the dropped weights come back from zero. Three arms beside it tell what it is worth: the
first phase alone, one dense training of the same total length, and the same three phases without masks, since
a schedule that starts again helps by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from archsearch import files
from archsearch.cost import Cost
from archsearch.errors import UsageError
from archsearch.rebuild import Traced
from archsearch.recipe import Recipe
from archsearch.results import Arm, Record
from archsearch.sparsity.masks import Masks, magnitude
from archsearch.sparsity.runs import Runs
from archsearch.sparsity.usage import masked_cost, uses
from archsearch.tensor_files import write_tensors
from archsearch.trainer import Say, Trained, Trainer, is_main, mean_arm

REDENSE_LR_DIVISOR = 10
"""The last phase has a tenth of the learning rate."""


@dataclass(frozen=True)
class Phases:
    """How long the phases are, and how much stays in the sparse one.

    Attributes:
        keep: Share of the weights of every layer that stays in the sparse phase, in ``(0, 1]``. The paper
            prunes 25 to 50 %, and 30 % in the convolutional networks for ImageNet.
        recipe: Of the first dense phase, and of the sparse one, which starts its schedule again.
        sparse_epochs: Epochs of the sparse phase; the recipe's by default.
        redense_epochs: Epochs of the last phase; the recipe's by default.
        seeds: How many times each arm is trained.
        seed: The first seed.
    """

    keep: float = 0.7
    recipe: Recipe = field(default_factory=Recipe)
    sparse_epochs: int | None = None
    redense_epochs: int | None = None
    seeds: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise UsageError(f"--keep {self.keep:g}: must be a share in (0, 1]")
        for name in ("sparse_epochs", "redense_epochs", "seeds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} {value}: at least 1")

    @property
    def sparse(self) -> Recipe:
        """Recipe of the sparse phase."""
        return self.recipe.with_(epochs=self.sparse_epochs or self.recipe.epochs)

    @property
    def redense(self) -> Recipe:
        """Recipe of the last phase: weight decay and dropout stay, the learning rate is a tenth."""
        epochs = self.redense_epochs or self.recipe.epochs
        return self.recipe.with_(epochs=epochs, lr=self.recipe.lr / REDENSE_LR_DIVISOR)

    @property
    def whole(self) -> Recipe:
        """Recipe of one dense training as long as the three phases together."""
        return self.recipe.with_(epochs=self.recipe.epochs + self.sparse.epochs + self.redense.epochs)


@dataclass(frozen=True)
class Run:
    """What the phases gave with one seed.

    Attributes:
        masks: Which weights the sparse phase trained.
        dense: After the first phase.
        sparse: After the second; the masked weights are zero.
        redense: After the third.
    """

    masks: Masks
    dense: Trained
    sparse: Trained
    redense: Trained


@dataclass(frozen=True)
class Dsd:
    """What ``dsd`` gives.

    Attributes:
        model: The network of the first seed after all three phases.
        runs: The phases of each seed.
        record: Conditions and arms of the comparison.
        files: What was written.
    """

    model: nn.Module
    runs: Sequence[Run]
    record: Record
    files: Sequence[Path]


def dsd(
    traced: Traced,
    phases: Phases,
    trainer: Trainer,
    *,
    out: Path | None = None,
    conditions: Mapping[str, Any] | None = None,
    say: Say = lambda line: None,
) -> Dsd:
    """Train a network dense, sparse and dense again, and compare it with dense trainings.

    Args:
        traced: The network; convolutions, linear, recurrent and attention weights are pruned.
        phases: How.
        trainer: Trains the arms.
        out: Directory of the results; ``None`` writes nothing.
        conditions: What else to record about the run.
        say: Takes lines for the user.

    Raises:
        UsageError: If the network has no weights to prune.
    """
    facts = {
        "method": "dsd",
        "keep": phases.keep,
        "sparse epochs": phases.sparse.epochs,
        "redense epochs": phases.redense.epochs,
        "seed": phases.seed,
        "seeds": phases.seeds,
        **(conditions or {}),
    }
    architecture = traced.architecture(traced.graph.sizes, facts)
    if out is not None:
        files.probe(out, 4 * traced.cost.reference.params)
    seeds = range(phases.seed, phases.seed + phases.seeds)
    runs = Runs(traced, trainer, phases.recipe, seeds, say)
    whole = [runs.train("dense, as long", runs.fresh(seed), seed, recipe=phases.whole) for seed in seeds]
    found = [train_phases(runs, phases, seed) for seed in seeds]
    unmasked = [
        list(_later_phases(runs, phases, run.dense.model, seed, None))
        for run, seed in zip(found, seeds, strict=True)
    ]
    record = Record(facts, _arms(traced, phases, whole, found, unmasked))
    model = found[0].redense.model
    written: list[Path] = []
    if out is not None and is_main():
        architecture.write(out / "architecture.yaml")
        write_tensors(out / "weights.safetensors", model.state_dict())
        found[0].masks.write(out / "masks.safetensors")
        names = ("architecture.yaml", "weights.safetensors", "masks.safetensors")
        written = [*(out / name for name in names), *record.write(out)]
    return Dsd(model, found, record, written)


def train_phases(runs: Runs, phases: Phases, seed: int) -> Run:
    """Train all three phases with one seed, each a training of its own that a later call finds again."""
    dense = runs.train("dense", runs.fresh(seed), seed)
    masks = magnitude(dense.model, phases.keep, "layer")
    sparse, redense = _later_phases(runs, phases, dense.model, seed, masks)
    return Run(masks, dense, sparse, redense)


def _later_phases(
    runs: Runs, phases: Phases, dense: nn.Module, seed: int, masks: Masks | None
) -> Iterator[Trained]:
    """Train the second and the third phase, without masks for the control."""
    name, again = ("sparse", "re-dense") if masks is not None else ("not pruned", "not pruned, again")
    start = copy.deepcopy(dense) if masks is None else masks.applied(dense)
    second = runs.train(name, start, seed, recipe=phases.sparse, masks=masks)
    yield second
    yield runs.train(again, copy.deepcopy(second.model), seed, recipe=phases.redense)


def _arms(
    traced: Traced,
    phases: Phases,
    whole: Sequence[Trained],
    found: Sequence[Run],
    unmasked: Sequence[Sequence[Trained]],
) -> list[Arm]:
    cost, used = traced.cost.reference, uses(traced.model, traced.example)
    masked = [masked_cost(cost, used, run.masks) for run in found]

    def arm(name: str, budget: str, costs: Sequence[Cost], trainings: Sequence[Sequence[Trained]]) -> Arm:
        """Return the arm of trainings that follow one another, for each seed."""
        last = mean_arm(name, "reference", budget, costs, [each[-1] for each in trainings])
        seconds = sum(trained.seconds for each in trainings for trained in each)
        return replace(last, epochs=sum(trained.epochs for trained in trainings[0]), seconds=seconds)

    control = [(run.dense, *later) for run, later in zip(found, unmasked, strict=True)]
    return [
        arm("dense", "reference", [cost], [(run.dense,) for run in found]),
        arm("dense, as long", "dense", [cost], [(trained,) for trained in whole]),
        arm("same phases, not pruned", "restarts", [cost], control),
        arm("sparse phase of dsd", "sparse", masked, [(run.dense, run.sparse) for run in found]),
        arm("dsd", "dsd", [cost], [(run.dense, run.sparse, run.redense) for run in found]),
    ]
