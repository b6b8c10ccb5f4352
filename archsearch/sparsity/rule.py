"""How much of each layer goes and by which criterion: from a network to its masks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from torch import nn

from archsearch.errors import UsageError
from archsearch.sparsity.criteria import CRITERIA, Batch
from archsearch.sparsity.masks import ALLOCATIONS, SCOPES, Masks, choose, weight_names

OUTPUT_RATES: Final = {"full": 1.0, "half": 0.5, "none": 0.0}


@dataclass(frozen=True)
class Rule:
    """How masks are chosen.

    Attributes:
        method: The criterion's name.
        allocation: ``"global"`` or ``"layer"``.
        scope: ``"all"`` or ``"conv"``; see ``weight_names``.
        output_rate: What a round takes of the output layer, beside all other layers: as much (``"full"``),
            half of its own share (``"half"``; Frankle & Carbin, ICLR 2019, section 2) or nothing
            (``"none"``).
    """

    method: str = "magnitude"
    allocation: str = "global"
    scope: str = "all"
    output_rate: str = "full"

    def __post_init__(self) -> None:
        CRITERIA[self.method]
        for option, known in (
            ("allocation", ALLOCATIONS),
            ("scope", SCOPES),
            ("output_rate", OUTPUT_RATES),
        ):
            if getattr(self, option) not in known:
                name = option.replace("_", "-")
                raise UsageError(f"--{name} {getattr(self, option)}: give {', '.join(known)}")

    def masks(
        self,
        model: nn.Module,
        keep: float,
        *,
        rounds: int = 1,
        output: str | None = None,
        within: Masks | None = None,
        batch: Batch | None = None,
        seed: int = 0,
    ) -> Masks:
        """Return what stays of a network's weights.

        Args:
            model: Is scored, and not changed.
            keep: Share of all weights that stays, in ``(0, 1]``. An output layer with a rate of its own has a
                share of its own; the rest share out ``keep`` of their own weights.
            rounds: In how many rounds ``keep`` was reached, each taking the same share of what was left.
            output: Weight of the output layer.
            within: The masks of the round before.
            batch: Training images, for criteria that look at them.
            seed: For those that draw.

        Raises:
            UsageError: If a share is not in ``(0, 1]``, or leaves too little.
        """
        names = weight_names(model, self.scope)
        scores = CRITERIA[self.method]().score(model, names, batch, seed)
        apart = {}
        if self.output_rate != "full" and output in names:
            apart[output] = self.output_keep(keep, rounds)
        return choose(scores, keep, self.allocation, within, apart)

    def output_keep(self, keep: float, rounds: int) -> float:
        """Return the share of the output layer that stays after ``rounds`` rounds."""
        taken = 1.0 - keep ** (1 / rounds)
        rate: float = 1.0 - OUTPUT_RATES[self.output_rate] * taken
        return math.pow(rate, rounds)
