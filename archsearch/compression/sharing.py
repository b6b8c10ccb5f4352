"""Weight sharing: the weights of a layer become a few values (Han et al., ICLR 2016, section 3).

One-dimensional k-means with linear initialisation. Clusters of numbers on a line are intervals, so the
weights are sorted once, and every step of Lloyd's algorithm is k searches and k differences of running sums:
what it costs does not depend on the number of weights.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

MAX_STEPS: Final = 3000


def k_means(values: npt.NDArray[np.floating], clusters: int, max_steps: int = MAX_STEPS) -> Floats:
    """Return centroids in rising order, from Lloyd's algorithm until nothing changes.

    They start evenly spread over ``[min, max]``, which serves the few large weights better than random or
    density-based starts (section 3.1). A cluster that loses all its weights is put on the weight that is
    farthest from its centroid, as scikit-learn does: without the small weights, which are pruned, many of
    the first clusters around zero are empty.

    Args:
        values: The surviving weights of a layer, ``(n,)``, at least one.
        clusters: How many centroids at most; no more than there are different values.
        max_steps: Steps of Lloyd's algorithm at most.

    Returns:
        ``(k,)``.
    """
    ordered = np.sort(values.astype(np.float64))
    different = np.concatenate([ordered[:1], ordered[1:][np.diff(ordered) > 0]])
    if len(different) <= clusters:
        return different
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    centroids = np.linspace(ordered[0], ordered[-1], clusters)
    before = np.empty(0, dtype=np.int64)
    for _ in range(max_steps):
        edges = _edges(ordered, centroids)
        if np.array_equal(edges, before):
            break
        before, counts, totals = edges, np.diff(edges), np.diff(sums[edges])
        if (empty := np.flatnonzero(counts == 0)).size:
            distances = np.abs(ordered - np.repeat(centroids, counts))
            farthest = np.argpartition(distances, -len(empty))[-len(empty) :]
            losers = np.searchsorted(edges, farthest, side="right") - 1
            np.subtract.at(totals, losers, ordered[farthest])
            np.subtract.at(counts, losers, 1)
            counts[empty], totals[empty] = 1, ordered[farthest]
        centroids = np.sort(np.where(counts > 0, totals / np.maximum(counts, 1), centroids))
    return centroids


def nearest(values: npt.NDArray[np.floating], centroids: Floats) -> npt.NDArray[np.int64]:
    """Return the index of the nearest centroid of each value, of equally near ones the lower."""
    return np.searchsorted((centroids[1:] + centroids[:-1]) / 2, values.astype(np.float64), side="left")


def _edges(ordered: Floats, centroids: Floats) -> npt.NDArray[np.int64]:
    """Return where each centroid's interval of sorted values begins, and after them where the last ends."""
    between = np.searchsorted(ordered, (centroids[1:] + centroids[:-1]) / 2, side="right")
    return np.concatenate([[0], between, [len(ordered)]])
