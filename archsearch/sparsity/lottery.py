"""The verb ``lottery``: prune in rounds, go back to early weights, train again, and compare.

Frankle & Carbin (*The Lottery Ticket Hypothesis*, ICLR 2019) prune a trained network, reset what stays to its
initial weights and train that: the ticket. Frankle et al. (ICML 2020) go back to the weights of an early step
instead, and Renda et al. (ICLR 2020) keep the weights and run the schedule again.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Generic

from torch import nn

from archsearch import files
from archsearch.errors import UsageError
from archsearch.rebuild import Traced
from archsearch.recipe import BUDGETS, Recipe
from archsearch.results import Record
from archsearch.sparsity.criteria import CRITERIA
from archsearch.sparsity.curve import Point, arms_of, write_points
from archsearch.sparsity.removal import ChannelRemoval, Kept, Removal, WeightRemoval
from archsearch.sparsity.rewinding import keeping, parse_step, rewound
from archsearch.sparsity.rule import Rule
from archsearch.sparsity.runs import Runs
from archsearch.tensor_files import write_tensors
from archsearch.trainer import Say, Trained, Trainer, is_main
from archsearch.training.determinism import derive_seed

CONTROLS: Final = {
    "reinit": "the ticket with fresh weights",
    "random": "as much of each layer by chance, with the ticket's weights",
    "lr-rewind": "weights as trained, the schedule again from its start",
    "finetune": "weights as trained, a short training at a low rate",
}
"""What is trained beside the ticket."""

_CHAINS: Final = ("lr-rewind", "finetune")
"""The controls that prune themselves, round after round; the others keep what the ticket keeps."""


@dataclass(frozen=True)
class LotteryPlan:
    """What to prune in rounds, and what to train beside it.

    Attributes:
        rounds: How often to prune.
        keep_per_round: Share that a round leaves of what was left, in ``(0, 1)``.
        rewind: Where the ticket's weights come from: ``"0"`` for the initialisation, or an early step of the
            dense training such as ``"500it"`` or ``"1ep"``.
        rule: How single weights are chosen; of a structured lottery its allocation alone counts.
        structured: Whether whole channels go, and a round leaves a share of the MACs.
        controls: Names of ``CONTROLS``.
        finetune: The budget of the control ``"finetune"``.
        recipe: How the dense network and every ticket is trained.
        seeds: How many lotteries.
        seed: The first seed.
    """

    rounds: int = 10
    keep_per_round: float = 0.8
    rewind: str = "0"
    rule: Rule = field(default_factory=Rule)
    structured: bool = False
    controls: Sequence[str] = ("reinit", "random")
    finetune: str = "finetune"
    recipe: Recipe = field(default_factory=Recipe)
    seeds: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.keep_per_round < 1:
            raise UsageError(f"--keep-per-round {self.keep_per_round:g}: must be a share in (0, 1)")
        for name in ("rounds", "seeds"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} {getattr(self, name)}: at least 1")
        if self.structured and self.rule != Rule(allocation=self.rule.allocation):
            raise UsageError(
                "--structured removes channels by l1_norm: leave out --method, --scope and --output-rate"
            )
        for control in self.controls:
            if control not in CONTROLS:
                raise UsageError(f"--controls {control}: give {', '.join(CONTROLS)}, or none")
        if not CRITERIA[self.rule.method].trained:
            raise UsageError(
                f"--method {self.rule.method} does not look at trained weights: give magnitude, and take "
                "archsearch sparsify to prune at the initialisation"
            )
        if not (BUDGETS[self.finetune].inherits and BUDGETS[self.finetune].epochs_divisor):
            raise UsageError(f"--finetune {self.finetune}: does not fine-tune; give finetune")

    def share(self, round_: int) -> float:
        """Return the share that stays after a round."""
        return self.keep_per_round**round_


@dataclass(frozen=True)
class Lottery:
    """What ``lottery`` gives.

    Attributes:
        points: The curve: every network that was trained.
        record: Conditions, and one arm for each kind of network and round.
        files: What was written.
    """

    points: Sequence[Point]
    record: Record
    files: Sequence[Path]


def lottery(
    traced: Traced,
    plan: LotteryPlan,
    trainer: Trainer,
    *,
    out: Path | None = None,
    conditions: Mapping[str, Any] | None = None,
    say: Say = lambda line: None,
) -> Lottery:
    """Prune in rounds, train the ticket and the controls of each, and draw up the curve.

    Args:
        traced: The network.
        plan: What to do.
        trainer: Trains, and finds again what was trained before.
        out: Directory of the results; ``None`` writes nothing.
        conditions: What else to record about the run.
        say: Takes lines for the user.

    Raises:
        UsageError: If the training has no such step to rewind to, or a round leaves too little.
        InfeasibleError: If no widths have as few MACs as a structured round asks for.
    """
    if out is not None:
        files.probe(out, 8 * traced.cost.reference.params)
    arguments = (traced, plan, trainer, say)
    draw: _Draw[Any]
    if plan.structured:
        draw = _Draw(*arguments, ChannelRemoval(traced, plan.rule.allocation))
    else:
        draw = _Draw(*arguments, WeightRemoval(traced, plan.rule))
    for seed in draw.runs.seeds:
        draw.all_rounds(seed)
    record = Record({**_provenance(plan), **(conditions or {})}, arms_of(draw.points))
    written: list[Path] = []
    if out is not None and is_main():
        write_points(out / "curve.csv", draw.points)
        written = [out / "curve.csv", *draw.write_tickets(out, record.conditions), *record.write(out)]
    return Lottery(draw.points, record, written)


class _Draw(Generic[Kept]):
    """One run of ``lottery``."""

    def __init__(
        self, traced: Traced, plan: LotteryPlan, trainer: Trainer, say: Say, removal: Removal[Kept]
    ) -> None:
        self._traced, self._plan, self._removal = traced, plan, removal
        seeds = range(plan.seed, plan.seed + plan.seeds)
        self.runs = Runs(traced, trainer, plan.recipe, seeds, say)
        self._rewind = parse_step(plan.rewind, trainer.steps_per_epoch(plan.recipe))
        steps = plan.recipe.epochs * trainer.steps_per_epoch(plan.recipe)
        if self._rewind >= steps:
            raise UsageError(f"--rewind {plan.rewind}: the training has {steps} steps; give an earlier one")
        self.points: list[Point] = []
        self._tickets: list[Kept] = []
        self._starts: list[nn.Module] = []

    def all_rounds(self, seed: int) -> None:
        """Train the dense network of a seed, then round after round of each kind."""
        dense, start = self._dense(seed)
        self._starts.append(start)
        for kind in ("ticket", *(name for name in _CHAINS if name in self._plan.controls)):
            trained, kept = dense, self._removal.everything()
            for round_ in range(1, self._plan.rounds + 1):
                before, kept = kept, self._removal.further(trained, kept, self._plan.share(round_), round_)
                if kind == "ticket":
                    trained = self._train(kind, self._removal.of(start, kept), kept, round_, seed)
                    self._compare(start, kept, round_, seed)
                else:
                    trained = self._train(kind, self._removal.on(trained, before, kept), kept, round_, seed)
                if kind == "ticket" and seed == self._plan.seed:
                    self._tickets.append(kept)

    def write_tickets(self, out: Path, provenance: Mapping[str, Any]) -> list[Path]:
        """Write the first seed's tickets: the weights that they go back to, and what each round keeps."""
        architecture, weights = out / "architecture.yaml", out / "weights.safetensors"
        self._traced.architecture(self._traced.graph.sizes, provenance).write(architecture)
        write_tensors(weights, self._starts[0].state_dict())
        return [
            architecture,
            weights,
            *(
                self._removal.write(kept, out / f"round-{round_:02d}", provenance)
                for round_, kept in enumerate(self._tickets, start=1)
            ),
        ]

    def _dense(self, seed: int) -> tuple[nn.Module, nn.Module]:
        """Train the dense network; return it, and one with the weights that tickets go back to."""
        step, start = self._rewind, self.runs.fresh(seed)
        if step == 0:
            dense = self.runs.train("dense", copy.deepcopy(start), seed)
        else:
            # An address of its own for each step: a training that kept no weights cannot give them later.
            runs = replace(self.runs, trainer=keeping(self.runs.with_data, step))
            identity = {"weights kept at step": step}
            dense = runs.train("dense", copy.deepcopy(start), seed, identity=identity)
            rewound(start, dense, step)
        self._note("dense", self._removal.everything(), 0, seed, dense)
        return dense.model, start

    def _compare(self, start: nn.Module, kept: Kept, round_: int, seed: int) -> None:
        """Train the controls that share what the ticket of a round keeps."""
        removal, controls = self._removal, self._plan.controls
        if "reinit" in controls:
            fresh = self.runs.drawn(seed, lambda: removal.fresh(kept))
            self._train("reinit", fresh, kept, round_, seed)
        if "random" in controls:
            chance = removal.by_chance(kept, derive_seed(seed, "random ticket", round_))
            self._train("random", removal.of(start, chance), chance, round_, seed)

    def _train(self, kind: str, model: nn.Module, kept: Kept, round_: int, seed: int) -> nn.Module:
        """Train what a round left, by the schedule of its kind."""
        plan, recipe = self._plan, self._plan.recipe
        trained = self.runs.train(
            f"{kind}, round {round_} of {plan.rounds}",
            model,
            seed,
            recipe=BUDGETS[plan.finetune].recipe(recipe) if kind == "finetune" else recipe,
            masks=self._removal.held(kept),
            start_step=self._rewind if kind in ("ticket", "random") else 0,
        )
        self._note(kind, kept, round_, seed, trained)
        return trained.model

    def _note(self, kind: str, kept: Kept, round_: int, seed: int, trained: Trained) -> None:
        cost = self._removal.cost(kept)
        share = self._removal.share(kept)
        self.points.append(
            Point(
                kind, round_, seed, share, cost.macs, cost.params,
                trained.accuracy, trained.epochs, trained.seconds,
            )
        )  # fmt: skip


def _provenance(plan: LotteryPlan) -> dict[str, Any]:
    return {
        "method": "structured lottery" if plan.structured else "lottery",
        "criterion": "l1_norm" if plan.structured else plan.rule.method,
        "allocation": plan.rule.allocation,
        **({} if plan.structured else {"scope": plan.rule.scope, "output rate": plan.rule.output_rate}),
        "rounds": plan.rounds,
        "kept per round": plan.keep_per_round,
        "rewind": plan.rewind,
        "seed": plan.seed,
        "seeds": plan.seeds,
    }
