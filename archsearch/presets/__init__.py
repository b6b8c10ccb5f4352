"""Published widths, by name: one file for each family of methods.

Importing the package registers them all.
"""

from __future__ import annotations

from archsearch.presets import l1_norm, regression, search, slimming, sss, thinet
from archsearch.presets.preset import PRESETS, Preset

__all__ = ["PRESETS", "Preset", "l1_norm", "regression", "search", "slimming", "sss", "thinet"]
