"""Pruners: what each channel unit is worth. One file per method.

A pruner is a frozen dataclass of its hyper-parameters with a ``score``. Registering it is all it takes to
appear in ``archsearch list pruners``, on the command line and in the contract tests.
"""

from archsearch.pruners import norm, plain  # noqa: F401  registers them
from archsearch.pruners.pruner import PRUNERS, Context, Pruner, Scores

__all__ = ["PRUNERS", "Context", "Pruner", "Scores"]
