"""Pruners: what each channel unit is worth. One file per method.

A pruner is a frozen dataclass of its hyper-parameters with a ``score``. Registering it is all it takes to
appear in ``archsearch list pruners``, on the command line and in the contract tests.
"""

from archsearch.pruners import (  # noqa: F401  importing a method registers it
    chip,
    fpgm,
    group_l1,
    hrank,
    norm,
    norm_scale,
    plain,
    regression,
    slimming,
    soft_filter,
    sss,
    taylor,
    thinet,
)
from archsearch.pruners.options import make_pruner, options_of
from archsearch.pruners.pruner import (
    PRUNERS,
    Batches,
    Context,
    Need,
    Pruner,
    Scores,
    SparseTraining,
    Sparsifying,
    inherit_weights,
)

__all__ = [
    "PRUNERS",
    "Batches",
    "Context",
    "Need",
    "Pruner",
    "Scores",
    "SparseTraining",
    "Sparsifying",
    "inherit_weights",
    "make_pruner",
    "options_of",
]
