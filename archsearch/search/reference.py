"""The network that a search starts from: trained here, or its weights are given."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cached_property

from torch import nn

from archsearch.allocation import Curves, select
from archsearch.graph import Selection
from archsearch.plan import Plan
from archsearch.pruners import Context, Scores
from archsearch.pruners.curves import curves
from archsearch.rebuild import Traced, load_weights
from archsearch.results import Arm
from archsearch.search.trial import fresh
from archsearch.trainer import Trained, Trainer, arm_of
from archsearch.training.evaluation import evaluate


class Reference:
    """The reference of a search, and what the proxy sees in it.

    Args:
        traced: The reference network.
        plan: Its method is the proxy.
        trainer: A blind one.
        weights: File with its weights, which is then not trained.
        trained: Whether the weights of ``traced``, as they are, are trained ones.
    """

    def __init__(
        self,
        traced: Traced,
        plan: Plan,
        trainer: Trainer,
        weights: str | None = None,
        *,
        trained: bool = False,
    ) -> None:
        self._traced, self._plan, self._trainer = traced, plan, trainer
        self._given: nn.Module | None = None
        if weights is not None or trained:
            self._given = copy.deepcopy(traced.model)
        if weights is not None and self._given is not None:
            load_weights(self._given, weights)

    @property
    def batch_size(self) -> int:
        """Images in a step."""
        return self._plan.recipe.batch_size

    @cached_property
    def model(self) -> nn.Module:
        """The trained network."""
        return self._given if self._given is not None else self._trained(self._trainer).model

    @cached_property
    def accuracy(self) -> float:
        """Its validation accuracy in percent."""
        trainer = self._trainer
        if self._given is None:
            return self._trained(trainer).accuracy
        return evaluate(self.model, trainer.measuring, self.batch_size, trainer.device).accuracy

    @cached_property
    def curves(self) -> Curves:
        """The proxy's error curves."""
        return curves(self._plan.pruner, self._context, self._scores)

    def selection(self, widths: Mapping[str, int]) -> Selection:
        """Return the units that the proxy's pruner keeps at some widths."""
        return select(self._scores, widths)

    def arm(self, trainer: Trainer) -> Arm:
        """Return its arm, as a trainer that sees the test set measures it."""
        cost = self._traced.cost.reference
        if self._given is None:
            return arm_of("reference", "reference", "reference", cost, [self._trained(trainer)])
        seen = evaluate(self._given, trainer.measuring, self.batch_size, trainer.device)
        return Arm("reference", "reference", "reference", cost.macs, cost.params, accuracies=(seen.accuracy,))

    @cached_property
    def _context(self) -> Context:
        return Context(
            self.model.cpu().eval(), self._traced.graph, self._plan.seed, self._trainer.calibration
        )

    @cached_property
    def _scores(self) -> Scores:
        return self._plan.pruner.score(self._context)

    def _trained(self, trainer: Trainer) -> Trained:
        model = fresh(self._traced, self._traced.graph.sizes, self._plan.seed)
        return trainer.train("reference", model, self._plan.recipe, self._plan.seed)
