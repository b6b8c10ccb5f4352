"""Latency on the user's own device: measured, tabulated, predicted."""

from archsearch.latency import engines as _engines  # noqa: F401  (they register themselves)
