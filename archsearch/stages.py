"""Stages: channel groups of a network that belong together, by their resolution or by their names.

Stages are what two networks of different depth have in common, so that what is known of one can be carried to
the other (``guide``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

from archsearch.graph import ChannelGraph
from archsearch.rebuild import Traced
from archsearch.registry import Registry
from archsearch.tracing import output_tensors

MAPS, VECTORS = "maps", "vectors"


@dataclass(frozen=True)
class Stage:
    """Channel groups that belong together.

    Attributes:
        name: What a person reads, such as ``32x32`` or ``layer1``.
        line: Stages of one line follow each other from input to output and can be paired with those of
            another network's line of this name: ``maps`` have positions, ``vectors`` behind them have none.
            A stage that has its name for itself alone is a line of its own.
        groups: Their names, in order of execution.
    """

    name: str
    line: str
    groups: tuple[str, ...]


StageRule: TypeAlias = Callable[[Traced], list[Stage]]
"""From a traced network to its stages, from input to output; each prunable group is in one."""

STAGE_RULES: Registry[StageRule] = Registry("stage rule")


def resolutions(graph: ChannelGraph, batch: int = 1) -> dict[str, tuple[int, ...]]:
    """Return the resolution at which each group is first computed, such as ``(32, 32)``; ``()`` for vectors.

    A group that only training computes has none, and counts as a vector.

    Args:
        graph: The traced groups.
        batch: Images in the example of the trace.
    """
    found: dict[str, tuple[int, ...]] = {}
    for activation in graph.trace.activations:
        labels = activation.labels
        if 0 in labels:  # no input has channels there: a weight that is computed from other parameters
            continue
        # Linear layers fold the positions of tokens into the batch.
        sizes = (activation.shape[0] // batch, *activation.shape[1:]) if activation.shape else ()
        places = tuple(size for dim, size in enumerate(sizes) if dim not in labels)
        places = places[1:] if places[:1] == (1,) else places
        for atoms in labels.values():
            for name in graph.groups_of(graph.unit_of_atom[atoms]):
                found.setdefault(name, places)
    return {name: found.get(name, ()) for name in graph.groups}


@STAGE_RULES.register("resolution")
def by_resolution(traced: Traced) -> list[Stage]:
    """Put layers whose outputs have the same height and width together (Liu et al., ICLR 2019, section 5)."""
    at = _resolutions(traced)
    return _collect((name, _shown(at[name]), _line(at[name]), -prod(at[name])) for name in at)


@STAGE_RULES.register("layer")
def by_layer(traced: Traced) -> list[Stage]:
    """Make each channel group a stage."""
    at = _resolutions(traced)
    return _collect((name, name, _line(at[name]), 0) for name in at)


@STAGE_RULES.register("name")
def by_name(traced: Traced) -> list[Stage]:
    """Put layers together whose names agree up to their number, such as layer1.0.conv1 and layer1.1.conv2."""
    names = {name: name_of_stage(name) for name in traced.graph.groups}
    return _collect((name, stage, stage, 0) for name, stage in names.items())


def name_of_stage(layer: str) -> str:
    """Return the stage that a layer's name tells.

    That is what stands before the first part that is a number (``layer1`` of ``layer1.0.conv1``), or else the
    name without the number at its end (``features.conv3`` of ``features.conv3_2``).
    """
    numbered = re.match(r"(.+?)\.\d+(\.|$)", layer)
    return numbered[1] if numbered else re.sub(r"_\d+$", "", layer)


def _resolutions(traced: Traced) -> dict[str, tuple[int, ...]]:
    return resolutions(traced.graph, output_tensors(traced.example)[0].shape[0])


def _shown(places: tuple[int, ...]) -> str:
    return "x".join(map(str, places)) or VECTORS


def _line(places: tuple[int, ...]) -> str:
    return MAPS if places else VECTORS


def _collect(rows: Iterable[tuple[str, str, str, int]]) -> list[Stage]:
    """Gather groups, each given with its stage and that one's line and rank, into stages by rank."""
    stages: dict[str, tuple[str, int, list[str]]] = {}
    for group, stage, line, rank in rows:
        stages.setdefault(stage, (line, rank, []))[2].append(group)
    order = sorted(stages, key=lambda stage: stages[stage][1])
    return [Stage(stage, stages[stage][0], tuple(stages[stage][2])) for stage in order]
