"""From a trained reference to the smaller network that a method leaves, at once or in steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from torch import nn

from archsearch.allocation import allocate, local, reference_count, select, solve
from archsearch.branches import find_branches
from archsearch.cost import CostModel
from archsearch.errors import ArchsearchError
from archsearch.graph import ChannelGraph, Selection
from archsearch.plan import Plan
from archsearch.pruners import Batches, Context, Scores, inherit_weights
from archsearch.pruners.curves import curves
from archsearch.rebuild import Traced
from archsearch.space import Widths
from archsearch.targets import Target
from archsearch.training.recalibration import recalibrate
from archsearch.verification import prunable_graph


@dataclass(frozen=True)
class Learned:
    """A trained network, and what a method's own sparse training trained around it, if it has one."""

    model: nn.Module
    sparse: nn.Module | None = None


Recover: TypeAlias = Callable[[nn.Module, ChannelGraph, Mapping[str, int], int], Learned]
"""Trains a network on after a step: the network, its groups, uniform widths for the next step, the step."""


@dataclass(frozen=True)
class Pruned:
    """What a method leaves.

    Attributes:
        selection: The kept units of each group of the reference.
        model: The small network with the weights that the method leaves.
    """

    selection: Selection
    model: nn.Module


def prune(
    traced: Traced, plan: Plan, reference: Learned, batches: Batches | None, recover: Recover
) -> Pruned:
    """Prune a trained reference to the plan's targets.

    In ``plan.steps`` steps the limits fall evenly from the reference's counts to the targets (Molchanov et
    al., ICLR 2017, alternate pruning and training likewise); each step scores the network that the step
    before has left and that has recovered since.

    Args:
        traced: The reference as it was traced.
        plan: Method, targets and steps.
        reference: Its trained weights.
        batches: Training images and labels, for methods that look at them.
        recover: Trains between two steps.

    Raises:
        InfeasibleError: If no allowed widths meet the targets.
        ArchsearchError: If what a step has left has other channel groups than the reference.
    """
    graph, cost, learned = traced.graph, traced.cost, reference
    allowed = plan.space.allowed(graph)
    selection: dict[str, Widths] = {name: np.arange(size) for name, size in graph.sizes.items()}
    for step in range(1, plan.steps + 1):
        targets = targets_at(plan, traced.cost, step)
        model = learned.model.cpu().eval()
        context = Context(model, graph, plan.seed, batches, learned.sparse)
        scores = plan.pruner.score(context)
        if plan.preset is not None:
            widths = plan.preset.widths(graph.sizes)
        else:
            errors = functools.partial(curves, plan.pruner, context, scores)
            widths = allocate(plan.allocation_name, cost, scores, errors, allowed, targets)
        kept = select(scores, widths)
        selection = {name: units[kept[name]] if name in kept else units for name, units in selection.items()}
        model = inherit_weights(plan.pruner, context, kept)
        if plan.recalibrate and batches is not None:
            recalibrate(model, batches())
        if step == plan.steps:
            break
        graph = prunable_graph(model, traced.example, whole_groups=graph.whole_groups)
        if traced.graph.branches:
            graph = find_branches(model, graph, traced.example)
        if graph.sizes != {name: width for name, width in widths.items() if width}:
            raise ArchsearchError(
                f"the network that step {step} of {plan.steps} leaves has other channel groups than "
                f"{traced.name}: give --steps 1"
            )
        cost = CostModel(model, graph, traced.cost.latency)
        allowed = allowed.up_to(graph.sizes)
        next_widths = uniform_widths(cost, allowed, targets_at(plan, traced.cost, step + 1))
        learned = recover(model, graph, next_widths, step)
    return Pruned(selection, model)


def targets_at(plan: Plan, reference: CostModel, step: int) -> list[Target]:
    """Return the plan's targets at one of its steps: with several, as limits that no longer name a share."""
    if plan.steps == 1:
        return list(plan.targets)
    return [
        target.part(reference_count(reference, target.resource), step, plan.steps) for target in plan.targets
    ]


def uniform_widths(cost: CostModel, allowed: Mapping[str, Widths], targets: list[Target]) -> dict[str, int]:
    """Return the widths of one keep ratio for all groups that meet the targets."""
    anything: Scores = {name: np.zeros(size) for name, size in cost.mapping(cost.sizes).items()}
    return solve(cost, local(anything), allowed, targets)
