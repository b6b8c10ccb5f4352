"""Places of the surviving weights as distances in few bits (Han et al., ICLR 2016, section 2, figure 2)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from archsearch.errors import IntegrityError

Places = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


def distances(places: Places, size: int, bits: int) -> tuple[Bytes, npt.NDArray[np.bool_]]:
    """Return the distance of each entry from the one before, less one, and which entries are weights.

    The first distance counts from just before the first place, and none exceeds ``2 ** bits``: where the next
    weight, or the end, is farther away, a filler (an entry that is a zero) goes before it.

    Args:
        places: Rising, in ``[0, size)``, ``(n,)``.
        size: Weights in all, zeros included.
        bits: From 1 to 8.

    Returns:
        Both ``(entries,)``.
    """
    span = 1 << bits
    steps = np.diff(places, prepend=-1) - 1
    fillers = steps // span
    last = int(places[-1]) if len(places) else -1
    trailing = (size - 1 - last) // span
    weights = np.cumsum(fillers + 1) - 1
    entries = len(places) + int(fillers.sum()) + trailing
    found, is_weight = np.full(entries, span - 1, dtype=np.uint8), np.zeros(entries, dtype=bool)
    found[weights], is_weight[weights] = steps % span, True
    return found, is_weight


def places_of(found: Bytes, size: int, bits: int, where: str = "relative indices") -> Places:
    """Return the place of each entry, fillers included.

    Raises:
        IntegrityError: If they do not end within the last ``2 ** bits`` of ``size`` places, which also bounds
            what a small file can claim to hold.
    """
    places = np.cumsum(found.astype(np.int64) + 1) - 1
    last = int(places[-1]) if len(places) else -1
    if not 0 <= size - 1 - last < 1 << bits:
        raise IntegrityError(f"{where}: the last of {len(found)} entries is at {last} of {size} weights")
    return places
