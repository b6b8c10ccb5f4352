"""``archsearch search``: from a reference to an architecture that held its own against uniform widths."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from torch import nn

from archsearch.allocation import Curves, LeastError
from archsearch.architecture import Architecture
from archsearch.errors import UsageError
from archsearch.plan import Plan
from archsearch.pruners import Context, Sparsifying
from archsearch.pruners.curves import curves
from archsearch.pruning import uniform_widths
from archsearch.rebuild import Traced, load_weights
from archsearch.results import Arm, Record
from archsearch.search.finals import Finalist, Outcome, finals
from archsearch.search.model import AdditiveModel
from archsearch.search.sampler import MODEL, SAMPLERS, make_sampler, told
from archsearch.search.study import Start, Surface, Value, opened, run
from archsearch.search.trial import OBJECTIVES, Scratch, fresh, validating
from archsearch.tensor_files import write_tensors
from archsearch.trainer import Say, Trained, Trainer, arm_of

NOISE_SEEDS = 3
"""How often uniform widths are trained, so that the noise shows before anything is believed."""


@dataclass(frozen=True)
class Quest:
    """How to search.

    Attributes:
        plan: Targets, space, recipe and budget; its method is the proxy, its seed that of the search.
        trials: How many networks to look at.
        objective: What they are worth: ``proxy``, ``short`` or ``full``.
        sampler: ``model``, or one of Optuna's.
        short: Share of the epochs with ``short``.
        finals: How many fresh seeds each finalist gets.
        thompson: Share of the model's trials that are drawn from its posterior.
    """

    plan: Plan
    trials: int = 100
    objective: str = "short"
    sampler: str = MODEL
    short: float = 0.25
    finals: int = 3
    thompson: float = 0.0

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise UsageError(f"--trials {self.trials}: at least 1")
        if not 0 < self.short <= 1:
            raise UsageError(f"--short {self.short:g}: a share of the epochs, in (0, 1]")
        if self.finals < 2:
            raise UsageError(f"--finals {self.finals}: an interval needs 2 seeds or more")
        if self.objective not in OBJECTIVES:
            raise UsageError(f"--objective {self.objective}: give {', '.join(OBJECTIVES)}")
        if self.sampler != MODEL:
            SAMPLERS[self.sampler]
        if not self.plan.targets:
            raise UsageError("nothing says how small: give --flops, --params, --memory or --channels")
        if isinstance(self.plan.pruner, Sparsifying):
            raise UsageError(
                f"--method {self.plan.method} trains the reference its own way: "
                "take a proxy that looks at a plainly trained one, such as l1_norm or taylor"
            )


@dataclass(frozen=True)
class Searched:
    """What a search gives.

    Attributes:
        architecture: What is exported, as in its file.
        record: Conditions and arms.
        outcome: The finalists and what was decided.
        files: What was written.
    """

    architecture: Architecture
    record: Record
    outcome: Outcome
    files: Sequence[Path] = field(default_factory=tuple)


def search(
    traced: Traced,
    quest: Quest,
    trainer: Trainer,
    *,
    out: Path,
    weights: str | None = None,
    conditions: Mapping[str, Any] | None = None,
    say: Say = lambda line: None,
) -> Searched:
    """Search the widths that train best at a target; the same call goes on where it was killed.

    Args:
        traced: The reference network.
        quest: How to search.
        trainer: Trains, and keeps what it trained.
        out: Directory of the study and the results.
        weights: File with the reference's weights, which is then not trained.
        conditions: What else to record.
        say: Takes lines for the user.

    Raises:
        InfeasibleError: If no allowed widths meet the targets; before anything is trained.
        ArchsearchError: If the study in ``out`` is another one, or in use.
    """
    plan = quest.plan
    if plan.drops_branches(traced.graph.sizes):
        traced = traced.with_branches()
    allowed = plan.space.allowed(traced.graph)
    surface = Surface(traced.cost, allowed, plan.targets)
    uniform = uniform_widths(traced.cost, allowed, list(plan.targets))
    scratch = Scratch(traced, plan.recipe, plan.budget, published_cost=plan.published_cost)
    blind, reference = validating(trainer), _Reference(traced, plan, weights)
    identity = {
        "model": traced.name,
        "data": trainer.data.fingerprint,
        "targets": [str(target) for target in plan.targets],
        "groups": {name: [int(steps[0]), int(steps[-1]), len(steps)] for name, steps in allowed.items()},
        "objective": quest.objective,
        **({"short": quest.short} if quest.objective == "short" else {}),
        "method": plan.label,
        "recipe": plan.recipe.as_dict(),
        "budget": plan.budget,
        "sampler": quest.sampler,
        "thompson": quest.thompson,
        "seed": plan.seed,
    }
    with opened(out, identity) as study:
        proxy = reference.curves(blind)
        pruned = LeastError().widths(traced.cost, proxy, allowed, plan.targets)
        model = AdditiveModel(traced.cost, allowed, plan.targets, proxy)
        starts = [Start("uniform", uniform, plan.seed), Start(plan.label, pruned, plan.seed)]
        if quest.objective != "proxy":
            starts += [Start("uniform, again", uniform, plan.seed + more) for more in range(1, NOISE_SEEDS)]
        trials = len(study.trials)
        sampler = make_sampler(
            quest.sampler, surface.names, plan.seed, trials, model, allowed, quest.thompson
        )
        value = _value(quest, scratch, blind, proxy)
        run(study, surface, sampler, value, quest.trials, starts, plan.seed, say)
        finalists = [
            Finalist("uniform", uniform),
            Finalist(plan.label, pruned),
            Finalist("search", _recommended(study, model)),
        ]
        if quest.sampler != MODEL:
            finalists.append(Finalist("best trial", _best(study, traced)))
        say(f"noise of a trial: {model.noise:.3g}, as the model estimates it")
        outcome = finals(finalists, scratch, blind, trainer, quest.finals, plan.seed)
        say(outcome.verdict)
        facts = {
            "method": "search",
            "target": ", ".join(map(str, plan.targets)),
            "proxy": plan.label,
            "objective": quest.objective,
            **({"short": quest.short} if quest.objective == "short" else {}),
            "sampler": quest.sampler,
            "trials": quest.trials,
            "noise": float(f"{model.noise:.4g}"),
            "budget": plan.budget,
            "seed": plan.seed,
            "finals": quest.finals,
            "verdict": outcome.verdict,
            "validation": {
                name: [round(accuracy, 2) for accuracy in accuracies]
                for name, accuracies in outcome.validation.items()
            },
            **(conditions or {}),
        }
        record = Record(facts, [reference.arm(trainer), *outcome.arms])
        return _write(traced, outcome, record, out)


class _Reference:
    """The network that the search starts from: trained here, or its weights are given."""

    def __init__(self, traced: Traced, plan: Plan, weights: str | None) -> None:
        self._traced, self._plan = traced, plan
        self._given: nn.Module | None = None
        if weights is not None:
            self._given = copy.deepcopy(traced.model)
            load_weights(self._given, weights)

    def curves(self, trainer: Trainer) -> Curves:
        """Return the error curves of the plan's method."""
        plan = self._plan
        model = self._given if self._given is not None else self._trained(trainer).model
        context = Context(model.cpu().eval(), self._traced.graph, plan.seed, trainer.calibration)
        return curves(plan.pruner, context, plan.pruner.score(context))

    def arm(self, trainer: Trainer) -> Arm:
        """Return its arm, with what a trainer measures."""
        cost = self._traced.cost.reference
        if self._given is not None:
            return Arm("reference", "reference", "reference", cost.macs, cost.params)
        return arm_of("reference", "reference", "reference", cost, [self._trained(trainer)])

    def _trained(self, trainer: Trainer) -> Trained:
        model = fresh(self._traced, self._traced.graph.sizes, self._plan.seed)
        return trainer.train("reference", model, self._plan.recipe, self._plan.seed)


def _value(quest: Quest, scratch: Scratch, blind: Trainer, proxy: Curves) -> Value:
    def error(widths: Mapping[str, int], seed: int) -> float:
        return -float(sum(proxy[name][width] for name, width in widths.items()))

    if quest.objective == "proxy":
        return error
    training = scratch.shortened(quest.short) if quest.objective == "short" else scratch
    return lambda widths, seed: training(blind, "trial", widths, seed).accuracy


def _recommended(study: optuna.Study, model: AdditiveModel) -> dict[str, int]:
    widths, values = told(study)
    if not len(values):
        raise UsageError("no trial of this search has a value: all diverged; give a lower --lr")
    model.tell(widths, values)
    return model.best()


def _best(study: optuna.Study, traced: Traced) -> dict[str, int]:
    widths, values = told(study)
    return traced.cost.mapping(widths[int(values.argmax())])


def _write(traced: Traced, outcome: Outcome, record: Record, out: Path) -> Searched:
    provenance = {name: fact for name, fact in record.conditions.items() if name != "validation"}
    provenance["widths of"] = outcome.exported.name
    architecture = traced.architecture(outcome.exported.widths, provenance)
    path = out / "architecture.yaml"
    if not path.exists() or Architecture.read(path).key != architecture.key:
        architecture.write(path)
    write_tensors(out / "weights.safetensors", outcome.model.state_dict())
    written = [path, out / "weights.safetensors", *record.write(out)]
    return Searched(architecture, record, outcome, written)
