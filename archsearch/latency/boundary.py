"""What a layer measured alone costs more than inside a network.

Alone, every layer is entered and left: the runtime starts a run, and brings the input and output into and out
of its own layout. Inside a network none of this happens between two layers. A layer ``k`` times behind itself
is entered and left once, so that what another one adds is its time inside; the rest is the boundary. It is
measured on a few layers, fitted as a constant and a part for each element that enters or leaves, neither
negative, and taken from all cells.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from archsearch.latency.cells import Cell

LEAST_SHARE = 0.1
"""Of its time alone that a layer takes inside a network, at least."""


@dataclass(frozen=True)
class Boundary:
    """Milliseconds to enter and leave a layer, and for each element that enters or leaves."""

    constant_ms: float = 0.0
    element_ms: float = 0.0

    @classmethod
    def fit(cls, ms: Mapping[tuple[Cell, int], float], elements: Mapping[Cell, int]) -> Boundary:
        """Fit the cells that were measured both alone and repeated.

        Args:
            ms: Of each cell and how often it stood behind itself.
            elements: That enter and leave each cell.
        """
        rows, costs = [], []
        for (cell, repeat), repeated in ms.items():
            if repeat > 1 and (cell, 1) in ms:
                inside = (repeated - ms[cell, 1]) / (repeat - 1)
                rows.append((1.0, float(elements[cell])))
                costs.append(ms[cell, 1] - inside)
        if not rows:
            return cls()
        columns = np.array(rows)
        scale = columns.max(axis=0)
        found, _ = nnls(columns / scale, np.maximum(np.array(costs), 0.0))
        return cls(*(found / scale).tolist())

    def inside(self, alone_ms: float, elements: int) -> float:
        """Return what a cell takes inside a network."""
        return max(LEAST_SHARE * alone_ms, alone_ms - self.constant_ms - self.element_ms * elements)
