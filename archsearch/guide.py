"""Guided design: what pruning left of some networks becomes the widths of a network.

Liu et al. (ICLR 2019, section 5) average the channels that pruning keeps in each stage of a network, and
build new networks with these averages: of the same kind, and of another for other data (VGG-16 to VGG-19).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from archsearch.allocation import solve
from archsearch.architecture import Architecture
from archsearch.errors import ArchsearchError, UsageError
from archsearch.rebuild import Traced, trace_architecture
from archsearch.space import SearchSpace, Widths
from archsearch.stages import STAGE_RULES, Stage
from archsearch.targets import Target

Shares = Mapping[Stage, Fraction]
"""The share of the channels of each stage that stays."""


def guide(
    architectures: Sequence[Architecture],
    traced: Traced,
    targets: Sequence[Target] = (),
    *,
    stage_by: str = "resolution",
    space: SearchSpace | None = None,
    trust_code: bool = False,
    provenance: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Architecture:
    """Return an architecture with the shares that others keep in each stage, on average.

    Without targets a group of ``C`` channels in a stage with the share ``s`` gets the allowed width nearest
    to ``s * C``, the larger of two. With targets all shares rise or fall together, by one factor, until the
    targets are met and no group can grow any more.

    Args:
        architectures: What was found, for one network or several, with one seed or more.
        traced: The network that gets the widths.
        targets: What its widths must meet.
        stage_by: Which layers are a stage: ``"resolution"``, ``"name"`` or ``"layer"``.
        space: Which widths are allowed.
        trust_code: Whether an architecture may name the user's own code.
        provenance: What else to record.
        say: Takes lines for the user.

    Raises:
        UsageError: If a stage of the network is in none of the architectures, or branches are to go.
        SpecError: If an architecture does not fit its model.
        InfeasibleError: If no allowed widths meet the targets.
    """
    space = space or SearchSpace()
    if space.drop_branches:
        raise UsageError(
            "--drop-branches: shares are averages, which leave no branch out; leave the option out"
        )
    allowed = space.allowed(traced.graph)
    shares = average_shares(architectures, traced, stage_by, allowed, trust_code=trust_code)
    for stage, share in shares.items():
        say(f"{stage.name}: {float(share):.4f} of the channels on average, for {_listed(stage.groups)}")
    share_of = {group: share for stage, share in shares.items() for group in stage.groups}
    sizes = traced.graph.sizes
    if targets:
        widths = solve(traced.cost, _priorities(share_of, sizes), allowed, targets)
    else:
        widths = allowed.together(
            {name: _nearest(share_of[name] * size, allowed[name]) for name, size in sizes.items()}
        )
    verified = traced.verify({name: np.arange(width) for name, width in widths.items()})
    if not verified.ok:
        raise ArchsearchError(f"the guided {traced.name} {verified.problem}; this is a bug of archsearch")
    say(f"verified: equal to the reference without the dropped channels, to {verified.error:.0e}")
    facts = {
        "method": "guided",
        "stages": stage_by,
        "from": [architecture.key for architecture in architectures],
        "from_models": list(dict.fromkeys(architecture.model for architecture in architectures)),
        "target": ", ".join(map(str, targets)) or "the average shares",
        "shares": {stage.name: round(float(share), 4) for stage, share in shares.items()},
        **(provenance or {}),
    }
    return traced.architecture(widths, facts)


def average_shares(
    architectures: Sequence[Architecture],
    traced: Traced,
    stage_by: str,
    allowed: Mapping[str, Widths],
    *,
    trust_code: bool = False,
) -> Shares:
    """Return the share that the architectures keep in each stage of a network, on average.

    Within an architecture a stage's share is its kept channels over all its channels. Where the networks
    differ in how many stages a line has, each of its ``n`` stages covers the ``n``-th part of the way from
    input to output, and a stage takes the average of what it lies on.

    Args:
        architectures: What was found.
        traced: The network whose stages are asked for.
        stage_by: Which layers are a stage.
        allowed: The widths of its groups; one whose channels all stay needs no share, and gets 1.
        trust_code: Whether an architecture may name the user's own code.

    Raises:
        UsageError: If a stage is in none of the architectures.
        SpecError: If an architecture does not fit its model.
    """
    if not architectures:
        raise UsageError("nothing guides: give at least one architecture file")
    rule = STAGE_RULES[stage_by]
    stages = rule(traced)
    sources: dict[str, Traced] = {}
    found: list[Shares] = []
    for architecture in architectures:
        facts = (architecture.model, architecture.arguments, architecture.input_shape)
        network = repr((*facts, architecture.whole_groups))
        if network not in sources or architecture.gathers:
            sources[network] = trace_architecture(architecture, trust_code=trust_code)
        architecture.check_groups(sources[network].graph.sizes)
        kept = _shares(architecture, rule(sources[network]))
        found.append(_carried(kept, architecture, stages, traced, stage_by, allowed))
    return {stage: sum((shares[stage] for shares in found), Fraction()) / len(found) for stage in stages}


def _shares(architecture: Architecture, stages: Sequence[Stage]) -> dict[Stage, Fraction]:
    widths = architecture.widths
    return {
        stage: Fraction(
            sum(widths[group].width for group in stage.groups),
            sum(widths[group].size for group in stage.groups),
        )
        for stage in stages
    }


def _carried(
    shares: Shares,
    architecture: Architecture,
    stages: Sequence[Stage],
    traced: Traced,
    stage_by: str,
    allowed: Mapping[str, Widths],
) -> Shares:
    """Bring an architecture's shares to the stages of another network, line by line."""
    carried: dict[Stage, Fraction] = {}
    for line in dict.fromkeys(stage.line for stage in stages):
        to = [stage for stage in stages if stage.line == line]
        values = [share for stage, share in shares.items() if stage.line == line]
        if not values:
            shrinking = [group for stage in to for group in stage.groups if len(allowed[group]) > 1]
            if shrinking:
                raise UsageError(_missing(architecture, shares, to[0], shrinking, traced, stage_by))
            values = [Fraction(1)]
        carried.update(zip(to, resampled(values, len(to)), strict=True))
    return carried


def resampled(values: Sequence[Fraction], count: int) -> list[Fraction]:
    """Spread a step function of ``len(values)`` equal steps over ``count`` equal steps, by averages."""
    width = Fraction(len(values), count)
    spread = []
    for step in range(count):
        total = Fraction()
        for place, value in enumerate(values):
            low = max(step * width, Fraction(place))
            high = min((step + 1) * width, Fraction(place + 1))
            total += max(high - low, Fraction()) * value
        spread.append(total / width)
    return spread


def _priorities(
    shares: Mapping[str, Fraction], sizes: Mapping[str, int]
) -> dict[str, npt.NDArray[np.float64]]:
    """Return priorities under which one threshold keeps the same multiple of every group's share."""
    return {
        name: 1 - (np.arange(size, dtype=np.float64) + 0.5) / max(float(shares[name]) * size, 0.5)
        for name, size in sizes.items()
    }


def _nearest(width: Fraction, allowed: Widths) -> int:
    """Return the allowed width nearest to ``width``; of two the larger."""
    nearest: int = min(allowed.tolist(), key=lambda some: (abs(some - width), -some))
    return nearest


def _missing(
    architecture: Architecture,
    shares: Shares,
    stage: Stage,
    shrinking: Sequence[str],
    traced: Traced,
    stage_by: str,
) -> str:
    known = _listed([stage.name for stage in shares])
    mend = f"leave its channels with --ignore '{shrinking[0]}'"
    other = "resolution" if stage_by == "name" else None
    if other:
        mend += f", or give --stage-by {other}, which pairs stages by depth"
    return (
        f"the stage {stage.name} of {traced.name} ({_listed(shrinking)}) is not in the architecture "
        f"{architecture.key} of {architecture.model}, which has {known}: {mend}"
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"
